"""The network: its settings, its vocabularies' sizes and the special tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[SEP]", "[SPE1]", "[SPE2]", "[MASK]", "[CLS]")
"""The paper's nine special tokens. They take the last nine ids of either vocabulary, in this order."""


class SpecialIds(NamedTuple):
    """Ids of the special tokens in a vocabulary; see :func:`special_ids`."""

    pad: int
    bos: int
    eos: int
    unk: int
    sep: int
    spe1: int
    spe2: int
    mask: int
    cls: int


def special_ids(vocabulary_size: int) -> SpecialIds:
    """Ids of the special tokens, which follow the ``vocabulary_size - 9`` ordinary entries."""
    return SpecialIds(*range(vocabulary_size - len(SPECIAL_TOKENS), vocabulary_size))


@dataclass(frozen=True, kw_only=True)
class VocabularySizes:
    """Sizes of the two vocabularies, special tokens included. The defaults are the paper's."""

    characters: Annotated[int, Gt(len(SPECIAL_TOKENS))] = 9_498
    """Characters of the dialogues."""
    persona_words: Annotated[int, Gt(len(SPECIAL_TOKENS))] = 10_011
    """Whole persona words: the keys 性别, 地址 and 兴趣, genders, places, tags."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One member of the model family. The defaults are AR+; see :data:`PRESETS`."""

    layers: Annotated[int, Gt(0)] = 6
    """Layers applied, in the encoder and in the decoder."""
    repeats: Annotated[int, Gt(0)] = 6
    """How often the unique layers are applied in turn: layers / repeats layers have weights of their own (ALBERT)."""
    d_model: Annotated[int, Gt(0)] = 512
    """Width d of the hidden states."""
    embedding_size: Annotated[int, Gt(0)] = 200
    """Width E of the embedding tables; projected to d where it differs (ALBERT)."""
    heads: Annotated[int, Gt(0)] = 8
    """Attention heads; must divide d."""
    ff_size: Annotated[int, Gt(0)] = 2048
    """Width of the feed-forward layer."""
    ff_bottleneck: Annotated[int | None, Gt(0)] = 100
    """Inner width of the factored feed-forward layer; None for the plain layer of two matrices."""
    rezero: bool = True
    """Gate each residual branch with one learnt scalar that starts at zero (Eq. 5) instead of post-normalising."""
    fixed_attention: Annotated[float, Ge(0)] = 0.1
    """b of Eq. 5: the share of O_T and O_C that bypasses the ReZero gate."""
    memory_hops: Annotated[int, Ge(0)] = 3
    """Hops of the MemN2N persona memory; 0 encodes the persona with the encoder instead (O_T then exists)."""
    auxiliary: Literal["infilling", "lm"] = "infilling"
    """The task behind L_LM: BART-style infilling of the response, or next-character language modelling."""
    tied_head: bool = False
    """Use the character table as output matrix too (AR); needs embedding_size = d_model."""
    decoder_norm: bool = True
    """Without ReZero: the decoder's first norm has weights of its own; AR shares the encoder's."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Dropout on embeddings, attention weights and residual branches."""
    persona_weight: Literal["one", "predicted"] = "one"
    """a of Eq. 1, the persona's share in a reply: one, or predicted for each reply from its context, which takes the
    labels that jobs/prepare.py makes."""

    @property
    def unique_layers(self) -> int:
        """Layers with weights of their own."""
        return self.layers // self.repeats

    def loss_counts(self, targets: int, examples: int) -> list[int]:
        """What each of a batch's summed losses is divided by: L_D, L_LM and, where a is predicted, L_W and a."""
        return [targets, targets, *[examples] * (2 * (self.persona_weight == "predicted"))]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.layers % self.repeats:
            yield "repeats", f"must divide layers = {self.layers} (got {self.repeats})"
        if self.d_model % self.heads:
            yield "heads", f"must divide d_model = {self.d_model} (got {self.heads})"
        if self.tied_head and self.embedding_size != self.d_model:
            yield "embedding_size", f"must equal d_model = {self.d_model} when tied_head is on"
