"""Features: hidden states of a frozen, pretrained model in place of what ours makes of characters, or beside it.

That model is not a part of the network: it is neither trained nor saved with it, and is handed in by whoever has it.
Shape suffixes are those of :mod:`arplus.model.batch`; H is the pretrained model's width.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig
from arplus.model.batch import Packed
from arplus.model.ops import Linear


class FrozenModel(Protocol):
    """The pretrained model."""

    def contextual(self, packed: Packed) -> list[Tensor]:
        """The hidden states of the chosen layers, (N, H) each: every token's is of its whole sequence."""

    def pointwise(self, packed: Packed, start: int) -> Tensor:
        """The embeddings alone, (N, H), each of its own token; ``start`` is the first position."""


class FeatureInput(nn.Module):
    """The features of a layer, or of several (mean, side by side, weighted), projected to E, or for the encoder to d.

    As vectors of characters they are divided by √E, by which inputs multiply these.
    """

    def __init__(self, config: ModelConfig, layers: int) -> None:
        super().__init__()
        features, encodes = config.features, config.features_for == "encoder"
        assert features.width is not None, "filled in when the run starts"
        self.combine = features.combine if layers > 1 else "mean"
        self.divisor = 1.0 if encodes else math.sqrt(config.embedding_size)
        if self.combine == "weighted":
            self.layer_weight, self.scale = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.ones(1))
        inputs = features.width * (layers if self.combine == "concat" else 1)
        self.projection = Linear(inputs, config.d_model if encodes else config.embedding_size)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """(N, H) of each layer to (N, E) or (N, D)."""
        if self.combine == "concat":
            f_NH = torch.cat(list(layers), dim=-1)
        elif self.combine == "mean":
            f_NH = torch.stack(list(layers)).mean(0)
        else:
            weight_L11 = self.layer_weight.softmax(0)[:, None, None]
            f_NH = self.scale * (weight_L11 * torch.stack(list(layers))).sum(0)
        return self.projection(f_NH) / self.divisor
