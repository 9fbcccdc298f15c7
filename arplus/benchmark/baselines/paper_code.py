"""AR+ in plain PyTorch, as the paper's own code has it: the other side where steps and replies are timed.

The same equations as :mod:`arplus.model`, with equal losses (``tests/benchmark/test_paper_code.py``), without any of
its savings: ``nn.MultiheadAttention`` with its defaults, one call per route and application (so every application
projects the encoded context again), the memory's query as B × S × D vectors in every hop, rows padded to the longest
of a batch, logits at every position, and losses that leave padding out afterwards. A reply takes one whole forward pass
per character, the auxiliary branch too.

Written from the paper and from a description of its code; shape suffixes are those of :mod:`arplus.model.batch`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.benchmark.baselines.padded import Padded
from arplus.config import ModelConfig, Sampling, VocabularySizes, special_ids
from arplus.model.generate import top_probabilities


class PaperLayer(nn.Module):
    """One set of weights for encoder and decoder, with ReZero (Eq. 5)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, wide, r, p = config.d_model, config.ff_size, config.ff_bottleneck, config.dropout
        assert r is not None
        assert config.rezero
        self.b = config.fixed_attention
        self.attention = nn.MultiheadAttention(d, config.heads, dropout=p, batch_first=True)
        expand = (nn.Linear(d, r), nn.ReLU(), nn.Linear(r, wide), nn.Dropout(p))
        contract = (nn.Linear(wide, r), nn.ReLU(), nn.Dropout(p), nn.Linear(r, d))
        self.feed_forward = nn.Sequential(*expand, *contract)
        self.pre_norm = nn.LayerNorm(d)
        self.dropout = nn.Dropout(p)
        self.r = nn.Parameter(torch.zeros(1))

    def encode(self, x_BSD: Tensor, pad_BS: Tensor) -> Tensor:
        """Encoder: x + r·Att(x), then x + r·FF(x)."""
        x_BSD = self.pre_norm(x_BSD)
        x_BSD = x_BSD + self.dropout(self.r * self.attention(x_BSD, x_BSD, x_BSD, key_padding_mask=pad_BS)[0])
        return x_BSD + self.dropout(self.r * self.feed_forward(x_BSD))

    def decode(self, x_BTD: Tensor, memory_BSD: Tensor, pad_BS: Tensor) -> Tensor:
        """Decoder: y = x + b·O_C + r·(O_C + O_prev), then y + r·FF(y)."""
        x_BTD = self.pre_norm(x_BTD)
        T = x_BTD.shape[1]
        future_TT = torch.full((T, T), -torch.inf, device=x_BTD.device).triu(1)
        previous_BTD = self.attention(x_BTD, x_BTD, x_BTD, attn_mask=future_TT)[0]
        context_BTD = self.attention(x_BTD, memory_BSD, memory_BSD, key_padding_mask=pad_BS)[0]
        x_BTD = x_BTD + self.b * context_BTD + self.r * self.dropout(context_BTD + previous_BTD)
        return x_BTD + self.r * self.dropout(self.feed_forward(x_BTD))


class PaperARPlus(nn.Module):
    """AR+ with all its methods; other rows are not written here."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        assert config.memory_hops
        assert config.auxiliary == "infilling"
        self.config = config
        self.pad, self.persona_pad = special_ids(sizes.characters).pad, special_ids(sizes.persona_words).pad
        d, E = config.d_model, config.embedding_size
        self.characters = nn.Embedding(sizes.characters, E)
        self.persona_words = nn.Embedding(sizes.persona_words, E)
        self.tables = nn.ModuleList(nn.Embedding(sizes.persona_words, d) for _ in range(config.memory_hops + 1))
        names = ("context", "auxiliary", "response")
        self.projections = nn.ModuleDict({name: nn.Linear(E, d) for name in names})
        self.layers = nn.ModuleList(PaperLayer(config) for _ in range(config.unique_layers))
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(d, sizes.characters, bias=False)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)

    def forward(self, batch: Padded) -> tuple[Tensor, Tensor]:
        """Logits (B, T, V) of the response and of the auxiliary task, at every position."""
        assert batch.infilled_BU is not None
        pad_BS = batch.context_BS == self.pad
        vectors_PWE = self.persona_words(batch.profiles_PW)
        profiles_PE = (vectors_PWE * (batch.profiles_PW != self.persona_pad)[..., None]).sum(1)
        context_BSD = self._embed(batch.context_BS, "context", functional.embedding(batch.speaker_BS, profiles_PE))
        query_BSD = self._embed(batch.context_BS, "auxiliary")
        o_BD = self._memory(batch.persona_BK, query_BSD, (~pad_BS).sum(1) - 1)
        memory_BSD = self._encode(context_BSD + o_BD[:, None], pad_BS)
        logits_BTV = self._decode(batch.response_BT, memory_BSD, pad_BS)
        pad_BU = batch.infilled_BU == self.pad
        infilled_BUD = self._encode(self._embed(batch.infilled_BU, "auxiliary"), pad_BU)
        return logits_BTV, self._decode(batch.response_BT, infilled_BUD, pad_BU)

    def _embed(self, ids_BS: Tensor, kind: str, added_BSE: Tensor | float = 0.0) -> Tensor:
        E = self.config.embedding_size
        position_S1 = torch.arange(ids_BS.shape[1], device=ids_BS.device)[:, None].float()
        angle_SE = position_S1 * torch.exp(
            torch.arange(0, E, 2, device=ids_BS.device).repeat_interleave(2)[:E] * (-math.log(10_000.0) / E)
        )
        even_E = torch.arange(E, device=ids_BS.device) % 2 == 0
        x_BSE = self.characters(ids_BS) * math.sqrt(E) + added_BSE + torch.where(even_E, angle_SE.sin(), angle_SE.cos())
        return self.dropout(self.projections[kind](x_BSE))

    def _memory(self, words_BK: Tensor, query_BSD: Tensor, length_B: Tensor) -> Tensor:
        _, S, D = query_BSD.shape
        j_S1 = torch.arange(1, S + 1, device=query_BSD.device)[:, None]
        k_D = torch.arange(1, D + 1, device=query_BSD.device) / D
        share_BS1 = j_S1 / length_B[:, None, None].clamp(min=1)
        weight_BSD = ((1 - share_BS1) - k_D * (1 - 2 * share_BS1)) * (j_S1 <= length_B[:, None, None])
        pad_BK = words_BK == self.persona_pad
        for a, c in zip(self.tables[:-1], self.tables[1:], strict=True):
            u_BD = (weight_BSD * query_BSD).sum(1)
            score_BK = (a(words_BK) * u_BD[:, None]).sum(-1)
            p_BK = score_BK.masked_fill(pad_BK, -torch.inf).softmax(-1)
            o_BD = (p_BK[..., None] * c(words_BK)).sum(1)
            query_BSD = query_BSD + o_BD[:, None]
        return o_BD

    def _encode(self, x_BSD: Tensor, pad_BS: Tensor) -> Tensor:
        for _ in range(self.config.repeats):
            for layer in self.layers:
                assert isinstance(layer, PaperLayer)
                x_BSD = layer.encode(x_BSD, pad_BS)
        return x_BSD

    def _decode(self, ids_BT: Tensor, memory_BSD: Tensor, pad_BS: Tensor) -> Tensor:
        x_BTD = self._embed(ids_BT, "response")
        for _ in range(self.config.repeats):
            for layer in self.layers:
                assert isinstance(layer, PaperLayer)
                x_BTD = layer.decode(x_BTD, memory_BSD, pad_BS)
        return self.head(x_BTD)


def mean_losses(model: PaperARPlus, batch: Padded) -> tuple[Tensor, Tensor]:
    """L_D and L_LM, means over the targets that are not padding."""
    target_BT = batch.target_BT.long()
    dialogue, auxiliary = (
        functional.cross_entropy(logits_BTV.flatten(0, 1), target_BT.flatten(), ignore_index=model.pad)
        for logits_BTV in model(batch)
    )
    return dialogue, auxiliary


@torch.no_grad()
def paper_replies(model: PaperARPlus, batch: Padded, settings: Sampling, bos: int) -> Tensor:
    """Ids (B, L) of replies by nucleus sampling, the whole network over the whole response for each character."""
    model.eval()
    assert settings.max_characters is not None, "Sampling.of fills it in"
    ids_BT = torch.full_like(batch.response_BT[:, :1], bos)
    for _ in range(settings.max_characters):
        logits_BV = model(batch._replace(response_BT=ids_BT))[0][:, -1] / settings.temperature
        p_BV = top_probabilities(logits_BV, top_k=settings.top_k, top_p=settings.top_p)
        ids_BT = torch.cat([ids_BT, torch.multinomial(p_BV, 1).to(ids_BT.dtype)], 1)
    return ids_BT[:, 1:]
