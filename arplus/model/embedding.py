"""From ids to the d-wide stream: character vector × √E, plus the speaker's persona, plus position, projected to d.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.config import ModelConfig
from arplus.model.batch import Sequences
from arplus.model.ops import Dropout, Linear


def sinusoid(length: int, width: int, *, device: torch.device | None = None) -> Tensor:
    """Positions 0 … as (length, width), sine and cosine interleaved (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(length, dtype=torch.float32, device=device)
    even = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angle = position[:, None] * torch.exp(even * (-math.log(10_000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


class SequenceInput(nn.Module):
    """One kind of input sequence: x = dropout(projection(√E · vector + added + position)).

    The projection is absent where E = d. The persona of a model without memory is a set and has no positions.
    """

    def __init__(self, config: ModelConfig, *, positions: bool = True) -> None:
        super().__init__()
        self.scale = math.sqrt(config.embedding_size)
        self.positions = positions
        same = config.embedding_size == config.d_model
        self.projection = nn.Identity() if same else Linear(config.embedding_size, config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, vectors_NE: Tensor, of: Sequences, added_NE: Tensor | float = 0.0, start: int = 0) -> Tensor:
        """(N, E) character vectors, and what is added to them unscaled, to (N, D); ``start`` is the first position."""
        x_NE = vectors_NE * self.scale + added_NE
        if self.positions:
            table_SE = sinusoid(start + of.width, x_NE.shape[1], device=x_NE.device).to(x_NE.dtype)
            x_NE = x_NE + functional.embedding(of.position_N, table_SE[start:])
        return self.dropout(self.projection(x_NE))
