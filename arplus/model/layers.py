"""The transformer layer of encoder and decoder: with ReZero (Eq. 5) or with norms after the branches.

One layer holds one set of weights. It serves the encoder and the decoder, and with ALBERT sharing it is applied
``groups`` times in each. Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig
from arplus.model.attention import Attention, KeyValue
from arplus.model.dropout import Dropout
from arplus.model.feed_forward import feed_forward, folded


class Gate(nn.Module):
    """ReZero's r: one learnt scalar a layer, zero at first, on every residual branch (Bachlechner et al. 2020)."""

    def __init__(self) -> None:
        super().__init__()
        self.r = nn.Parameter(torch.zeros(1))

    def forward(self, branch: Tensor | int) -> Tensor:
        """The branch, gated."""
        return self.r * branch


class Layer(nn.Module, ABC):
    """What both kinds of layer have: the routes and the feed-forward."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention = Attention(config.d_model, config.heads, config.dropout)
        self.feed_forward = feed_forward(config)
        self.dropout = Dropout(config.dropout)

    def folded(self) -> Self:
        """A layer of the same parameters whose feed-forward is :func:`folded`."""
        twin = copy.copy(self)
        twin._modules = self._modules | {"feed_forward": folded(self.feed_forward)}
        return twin

    @abstractmethod
    def encode(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """One application in the encoder."""

    @abstractmethod
    def decode(
        self, x_BTD: Tensor, memories: Sequence[KeyValue], past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """One application in the decoder; also returns keys and values of the sequence so far, for the cache."""


class ReZeroLayer(Layer):
    """Pre-norm, which overwrites the residual stream, then two branches gated by r."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.b = config.fixed_attention
        self.pre_norm = nn.LayerNorm(config.d_model)
        self.gate = Gate()

    def encode(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """Encoder: x + r·Att(x), then x + r·FF(x)."""
        x_BSD = self.pre_norm(x_BSD)
        x_BSD = x_BSD + self.gate(self.dropout(self.attention(x_BSD, real_BS)))
        return x_BSD + self.gate(self.dropout(self.feed_forward(x_BSD)))

    def decode(
        self, x_BTD: Tensor, memories: Sequence[KeyValue], past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Decoder, Eq. 5: y = x + b·O_T + b·O_C + r·O_merge, then y + r·FF(y)."""
        x_BTD = self.pre_norm(x_BTD)
        merged_BTD, memories_BTD, own = self.attention.routes(x_BTD, memories, past)
        output, n = self.attention.output, len(memories)
        if memories_BTD is None or not self.b:
            y_BTD = x_BTD + self.gate(self.dropout(output(merged_BTD, 1 + n)))
        elif self.training:
            y_BTD = x_BTD + self.gate(self.dropout(output(merged_BTD, 1 + n))) + self.b * output(memories_BTD, n)
        else:
            # Without dropout all is linear in the heads, and one product does for two: 3 % of generation.
            both_BTD = self.gate(merged_BTD) + self.b * memories_BTD
            y_BTD = x_BTD + output(both_BTD, self.gate(1 + n) + self.b * n)
        return y_BTD + self.gate(self.dropout(self.feed_forward(y_BTD))), own


class PostNormLayer(Layer):
    """Without ReZero: one norm on the stream and one after attention; none after the feed-forward, as in the code."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.norm1 = nn.LayerNorm(config.d_model)
        self.norm2 = nn.LayerNorm(config.d_model)
        self.pre_norm = nn.LayerNorm(config.d_model) if config.decoder_norm else None

    def encode(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """Encoder: norm2, then norm1(x + Att(x)), then x + FF(x)."""
        x_BSD = self.norm2(x_BSD)
        x_BSD = self.norm1(x_BSD + self.dropout(self.attention(x_BSD, real_BS)))
        return x_BSD + self.dropout(self.feed_forward(x_BSD))

    def decode(
        self, x_BTD: Tensor, memories: Sequence[KeyValue], past: KeyValue | None = None
    ) -> tuple[Tensor, KeyValue]:
        """Decoder: pre_norm (AR: the encoder's norm2), then norm1(x + O_merge), Eq. 2, then y + FF(y)."""
        x_BTD = self.norm2(x_BTD) if self.pre_norm is None else self.pre_norm(x_BTD)
        merged_BTD, _, own = self.attention.routes(x_BTD, memories, past)
        y_BTD = self.norm1(x_BTD + self.dropout(self.attention.output(merged_BTD, 1 + len(memories))))
        return y_BTD + self.dropout(self.feed_forward(y_BTD)), own
