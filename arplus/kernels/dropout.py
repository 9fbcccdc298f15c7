"""Dropout on the CPU from fewer random numbers: one per dropped element.

torch draws a double for every element there, one after the other in a single thread: 5.8 ns of the 6.7 that an element
costs, a fifth of a training step of two threads (``jobs/benchmark.py train``).
"""

import math
from typing import Any

import torch
from torch import Tensor


def dropout(x: Tensor, p: float) -> Tensor:
    """:meth:`Operations.dropout`; all draws come from torch's generator, so ``torch.manual_seed`` repeats them."""
    dropped: Tensor = _Dropout.apply(x, p)
    return dropped


def draw_dropped(n: int, p: float) -> Tensor:
    """Which of n elements are dropped, each with probability ``p`` in (0, 1): ascending, int32.

    The gaps between them are drawn, which are geometric: p · n numbers instead of n.
    """
    if n >= 1 << 30:
        raise ValueError(
            f"dropout of {n:,} elements at once, of at most 2**30: lower --batch-size or raise "
            "--gradient-accumulation-steps"
        )
    if n == 0:
        return torch.empty(0, dtype=torch.int32)
    places: list[Tensor] = []
    last = -1
    while last < n - 1:
        expected = (n - 1 - last) * p
        gaps = torch.rand(int(expected + 4 * math.sqrt(expected)) + 1).neg_().log1p_().div_(math.log1p(-p))
        gaps.clamp_(max=1.001 * n)  # a tiny p makes gaps that 32 bits do not hold; the factor is for rounding
        places.append(gaps.int().add_(1).cumsum(0, dtype=torch.int32).add_(last))
        last = int(places[-1][-1])
    drawn = torch.cat(places) if len(places) > 1 else places[0]
    return drawn[: int(torch.searchsorted(drawn, n))]


def drop_(x: Tensor, place_M: Tensor) -> Tensor:
    """Zeroes the places (M,) of a contiguous tensor, counted as if it were flat, and returns it."""
    x.view(-1).index_fill_(0, place_M.long(), 0)
    return x


class _Dropout(torch.autograd.Function):
    """It keeps four bytes per dropped element for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float) -> Tensor:
        place_M = draw_dropped(x.numel(), p)
        ctx.save_for_backward(place_M)
        ctx.scale = 1 / (1 - p)
        return drop_((x * ctx.scale).contiguous(), place_M)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (place_M,), (gradient,) = ctx.saved_tensors, gradients
        return drop_((gradient * ctx.scale).contiguous(), place_M), None
