"""Dropout: torch's own where it is a fused kernel, on a GPU, and one from cheaper random bits on the CPU.

torch draws a double for every element there, one after the other in a single thread: 5.8 ns of the 6.7 that an element
costs, a tenth of a training step of one thread and a fifth of two. A random byte does as well, for 1 ns.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

_LEVELS = 256


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zeroes each element with probability ``p`` and scales the rest up, so that the expectation stays; any shape.

    On the CPU each call drops with one of the two multiples of 1/256 next to ``p``, drawn so that their mean is ``p``,
    and scales up by that one. All draws come from torch's generator, so ``torch.manual_seed`` makes them reproducible.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu":
        return functional.dropout(x, p)
    dropped: Tensor = _Dropped.apply(x, draw_levels(p))
    return dropped


def draw_levels(p: float) -> int:
    """How many of the 256 values of a byte drop an element in one call: 256 · p, rounded up as often as it is above."""
    return min(int(p * _LEVELS + torch.rand(()).item()), _LEVELS - 1)


def scale_of(levels: int) -> float:
    """What the elements that stay are multiplied by."""
    return _LEVELS / (_LEVELS - levels)


def draw_kept(shape: torch.Size, levels: int) -> Tensor:
    """1 for every element that stays and 0 for one that is dropped, int8, on the CPU."""
    n = shape.numel()
    words = torch.empty(-(-n // 8), dtype=torch.int64).random_(-(2**63), None)
    # In place, so that the answers are numbers: bools are four times as slow to multiply with.
    return words.view(torch.int8)[:n].view(shape).ge_(levels - _LEVELS // 2)


def draw_dropped(n: int, p: float) -> Tensor:
    """Which of n elements are dropped, each with probability ``p`` in (0, 1): ascending, int32, on the CPU.

    The gaps between them are drawn, which are geometric: p · n numbers instead of n.
    """
    assert n < 1 << 30, "places would overflow 32 bits"
    places: list[Tensor] = []
    last = -1
    while last < n - 1:
        expected = (n - 1 - last) * p
        gaps = torch.rand(int(expected + 4 * math.sqrt(expected)) + 1).neg_().log1p_().div_(math.log1p(-p))
        places.append(gaps.int().add_(1).cumsum(0, dtype=torch.int32).add_(last))
        last = int(places[-1][-1])
    drawn = torch.cat(places)
    return drawn[: int(torch.searchsorted(drawn, n))]


class _Dropped(torch.autograd.Function):
    """Dropout of ``levels`` in 256 elements. It keeps a byte an element for the backward pass, not a float."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, levels: int) -> Tensor:
        kept = draw_kept(x.shape, levels)
        ctx.save_for_backward(kept)
        ctx.scale = scale_of(levels)
        # The scale comes last: bf16 would round it by itself.
        return kept.to(x.dtype).mul_(x).mul_(ctx.scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,), (gradient,) = ctx.saved_tensors, gradients
        return kept.to(gradient.dtype).mul_(gradient).mul_(ctx.scale), None


class Dropout(nn.Module):
    """:func:`dropout` as a module."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drops elements of x in training."""
        return dropout(x, self.p, self.training)
