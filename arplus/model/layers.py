"""The transformer layer of encoder and decoder: with ReZero (Eq. 5) or with norms after the branches (Eq. 2).

One layer holds one set of weights. It serves the encoder and the decoder, or one of them where each has its own, and
with ALBERT sharing it is applied again and again in each. Shape suffixes are those of :mod:`arplus.model.batch`.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.config import ModelConfig
from arplus.model.attention import Attention, Blocks
from arplus.model.batch import Sequences
from arplus.model.ops import Dropout, Linear

Stack = Literal["both", "encoder", "decoder"]
"""What a layer serves."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu-tanh": partial(functional.gelu, approximate="tanh"),
}


class FeedForward(nn.Module):
    """The position-wise feed-forward d → FF → d."""

    def __init__(self, d_model: int, ff_size: int, dropout: float, activation: str) -> None:
        super().__init__()
        self.expand, self.contract = Linear(d_model, ff_size), Linear(ff_size, d_model)
        self.activate, self.dropout = _ACTIVATIONS[activation], Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return self.contract(self.dropout(self.activate(self.expand(x))))


class FactoredFeedForward(nn.Module):
    """The factored feed-forward d → r → FF → r → d, with a ReLU at each r."""

    def __init__(self, d_model: int, r: int, ff_size: int, dropout: float) -> None:
        super().__init__()
        self.narrow, self.expand = Linear(d_model, r), Linear(r, ff_size)
        self.contract: Linear | nn.Identity = Linear(ff_size, r)
        self.widen = Linear(r, d_model)
        self.dropout = Dropout(dropout)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        x_NR = self.narrow(x_ND).relu()
        x_NR = self.contract(self.dropout(self.expand(x_NR)))
        return self.widen(self.dropout(x_NR.relu()))

    @torch.no_grad()
    def fold(self) -> None:
        """Makes of r → FF → r, which is linear without dropout, one product r → r: for replies, not for training."""
        expand, contract = self.expand, self.contract
        if isinstance(contract, nn.Identity):
            return
        folded = nn.utils.skip_init(Linear, expand.in_features, contract.out_features)
        folded.weight = nn.Parameter(contract.weight @ expand.weight)
        folded.bias = nn.Parameter(torch.addmv(contract.bias, contract.weight, expand.bias))
        folded.ops = expand.ops
        self.expand, self.contract = folded, nn.Identity()


class Adapter(nn.Module):
    """What is trained where all else is frozen: x + up(ReLU(down(x))), at first x itself (Houlsby et al. 2019)."""

    def __init__(self, d_model: int, inner: int) -> None:
        super().__init__()
        self.down, self.up = Linear(d_model, inner), Linear(inner, d_model)

    def reset_parameters(self) -> None:
        """Initialises as section 3.6 of the paper has it, but with an ``up`` of exactly zero."""
        nn.init.trunc_normal_(self.down.weight, std=0.01, a=-0.02, b=0.02)
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)

    def forward(self, x_ND: Tensor) -> Tensor:
        """(N, D) to (N, D)."""
        return x_ND + self.up(self.down(x_ND).relu())


class Layer(nn.Module, ABC):
    """What both kinds of layer have: the routes and the feed-forward, each with an adapter where there are any."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, r, p = config.d_model, config.ff_bottleneck, config.dropout
        self.attention = Attention(d, config.heads, p)
        self.feed_forward = (
            FeedForward(d, config.ff_size, p, config.activation)
            if r is None
            else FactoredFeedForward(d, r, config.ff_size, p)
        )
        self.attention_adapter, self.feed_forward_adapter = (
            nn.Identity() if config.adapter is None else Adapter(d, config.adapter) for _ in range(2)
        )
        self.dropout = Dropout(p)

    def feed(self, x_ND: Tensor) -> Tensor:
        """The feed-forward's branch."""
        return self.dropout(self.feed_forward_adapter(self.feed_forward(x_ND)))

    def merge(self, o_ND: Tensor) -> Tensor:
        """The attention's branch, from what its routes found together."""
        return self.dropout(self.attention_adapter(o_ND))

    @abstractmethod
    def encode(self, x_ND: Tensor, of: Sequences) -> Tensor:
        """One application in the encoder."""

    @abstractmethod
    def decode(
        self, x_ND: Tensor, of: Sequences, memories: Sequence[Blocks], past: Blocks | None = None
    ) -> tuple[Tensor, Blocks]:
        """One application in the decoder; also returns keys and values of the sequences so far, for the cache."""


class ReZeroLayer(Layer):
    """Pre-norm, which overwrites the residual stream, then two branches gated by r (Bachlechner et al. 2020)."""

    def __init__(self, config: ModelConfig, of: Stack = "both") -> None:
        super().__init__(config)
        self.b = config.fixed_attention
        self.pre_norm = nn.LayerNorm(config.d_model)
        self.r = nn.Parameter(torch.full((1,), config.gate_start))

    def encode(self, x_ND: Tensor, of: Sequences) -> Tensor:
        """Encoder: x + r·Att(x), then x + r·FF(x)."""
        x_ND = self.pre_norm(x_ND)
        x_ND = x_ND + self.r * self.merge(self.attention(x_ND, of))
        return x_ND + self.r * self.feed(x_ND)

    def decode(
        self, x_ND: Tensor, of: Sequences, memories: Sequence[Blocks], past: Blocks | None = None
    ) -> tuple[Tensor, Blocks]:
        """Decoder, Eq. 5: y = x + b·O_T + b·O_C + r·O_merge, then y + r·FF(y)."""
        x_ND = self.pre_norm(x_ND)
        o_prev_ND, o_memories, own = self.attention.routes(x_ND, of, memories, past)
        o_fixed_ND = torch.stack(o_memories).sum(0) if o_memories else torch.zeros_like(x_ND)  # O_T + O_C
        y_ND = x_ND + self.b * o_fixed_ND + self.r * self.merge(o_fixed_ND + o_prev_ND)
        return y_ND + self.r * self.feed(y_ND), own


class PostNormLayer(Layer):
    """Without ReZero: one norm on the stream and one after attention; none after the feed-forward, as in the code."""

    def __init__(self, config: ModelConfig, of: Stack = "both") -> None:
        super().__init__(config)
        own_first = config.decoder_norm  # of the decoder
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.Identity() if of == "decoder" and own_first else nn.LayerNorm(config.d_model)
        self.pre_norm = nn.LayerNorm(config.d_model) if of != "encoder" and own_first else None

    def encode(self, x_ND: Tensor, of: Sequences) -> Tensor:
        """Encoder: norm2, then norm1(x + Att(x)), then x + FF(x)."""
        x_ND = self.norm2(x_ND)
        x_ND = self.norm1(x_ND + self.merge(self.attention(x_ND, of)))
        return x_ND + self.feed(x_ND)

    def decode(
        self, x_ND: Tensor, of: Sequences, memories: Sequence[Blocks], past: Blocks | None = None
    ) -> tuple[Tensor, Blocks]:
        """Decoder: pre_norm (AR: the encoder's norm2), then norm1(x + O_merge), Eq. 2, then y + FF(y)."""
        x_ND = self.norm2(x_ND) if self.pre_norm is None else self.pre_norm(x_ND)
        o_prev_ND, o_memories, own = self.attention.routes(x_ND, of, memories, past)
        y_ND = self.norm1(x_ND + self.merge(o_prev_ND + sum(o_memories)))
        return y_ND + self.feed(y_ND), own
