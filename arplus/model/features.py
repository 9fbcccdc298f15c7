"""Features: hidden states of a frozen, pretrained model in place of what ours makes of characters, or beside it.

That model is not a part of the network: it is neither trained nor saved with it, and is handed in by whoever has it.
Shape suffixes are those of :mod:`arplus.model.batch`; H is the pretrained model's width.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from arplus.config import FeaturesConfig
from arplus.model.batch import Packed
from arplus.model.ops import Linear


class FrozenModel(Protocol):
    """The pretrained model."""

    def contextual(self, packed: Packed) -> list[Tensor]:
        """The hidden states of the chosen layers, (N, H) each: every token's is of its whole sequence."""

    def pointwise(self, packed: Packed, start: int) -> Tensor:
        """The embeddings alone, (N, H), each of its own token; ``start`` is the first position."""


class FeatureInput(nn.Module):
    """Features combined and projected to the width that is wanted: a layer's, their mean, side by side, or weighted."""

    def __init__(self, config: FeaturesConfig, layers: int, width: int) -> None:
        super().__init__()
        assert config.width is not None, "filled in when the run starts"
        self.combine = config.combine if layers > 1 else "mean"
        if self.combine == "weighted":
            self.layer_weight, self.scale = nn.Parameter(torch.zeros(layers)), nn.Parameter(torch.ones(1))
        self.projection = Linear(config.width * (layers if self.combine == "concat" else 1), width)

    def forward(self, layers: Sequence[Tensor]) -> Tensor:
        """(N, H) of each layer to (N, width)."""
        if self.combine == "concat":
            return self.projection(torch.cat(list(layers), dim=-1))
        f_LNH = torch.stack(list(layers))
        if self.combine == "mean":
            return self.projection(f_LNH.mean(0))
        return self.projection(self.scale * (self.layer_weight.softmax(0)[:, None, None] * f_LNH).sum(0))
