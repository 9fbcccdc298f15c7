"""From ids to the d-wide stream: character vector × √E, plus the speaker's persona, plus position, projected to d.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.config import ModelConfig
from arplus.model.dropout import Dropout
from arplus.model.linear import Linear


def sinusoid(length: int, width: int, *, start: int = 0, device: torch.device | None = None) -> Tensor:
    """Positions ``start`` … as (length, width), sine and cosine interleaved (Vaswani et al. 2017, section 3.5)."""
    position = torch.arange(start, start + length, dtype=torch.float32, device=device)
    even = torch.arange(0, width, 2, dtype=torch.float32, device=device)
    angle = position[:, None] * torch.exp(even * (-math.log(10_000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], dim=-1).flatten(1)[:, :width]


def speaker_personas(profiles_BPE: Tensor, context_profile_BS: Tensor) -> Tensor:
    """The persona sum (B, S, E) of who speaks at each context position.

    The batch's profiles are looked up as one embedding table of B·P rows, whose backward pass is fast everywhere.
    """
    B, P, _ = profiles_BPE.shape
    first_row_B1 = P * torch.arange(B, device=profiles_BPE.device)[:, None]
    return functional.embedding(context_profile_BS + first_row_B1, profiles_BPE.flatten(0, 1))


def masked_sum(vectors: Tensor, real: Tensor) -> Tensor:
    """Sum over the last but one dimension, padding left out: (…, W, E) and (…, W) to (…, E)."""
    return (vectors * real.unsqueeze(-1)).sum(dim=-2)


class SequenceInput(nn.Module):
    """One kind of input sequence: x = dropout(projection(√E · vector + added + position)).

    The projection is absent where E = d. The target persona of a model without memory is a set and has no positions.
    """

    def __init__(self, config: ModelConfig, *, positions: bool = True) -> None:
        super().__init__()
        self.scale = math.sqrt(config.embedding_size)
        self.positions = positions
        same = config.embedding_size == config.d_model
        self.projection = nn.Identity() if same else Linear(config.embedding_size, config.d_model)
        self.dropout = Dropout(config.dropout)

    def forward(self, vectors_BSE: Tensor, added_BSE: Tensor | None = None, start: int = 0) -> Tensor:
        """(B, S, E) character vectors, and what is added to them unscaled, to (B, S, D); ``start`` is the position."""
        x_BSE = vectors_BSE * self.scale
        if added_BSE is not None:
            x_BSE = x_BSE + added_BSE
        if self.positions:
            x_BSE = x_BSE + sinusoid(*x_BSE.shape[1:], start=start, device=x_BSE.device).to(x_BSE.dtype)
        return self.dropout(self.projection(x_BSE))
