"""Operations on CPUs: oneDNN's products and cheaper random numbers.

torch multiplies fp32 matrices with MKL there. On an AMD EPYC (Zen 4) that took 17 % longer than oneDNN for the
512-wide layers and 55 % for the output head, whose rows of 9,498 logits do not begin at a cache line; training steps of
batch 64 take 6 to 13 % less with it (two threads, interleaved).
"""

import os
from typing import Any

import torch
from torch import Tensor

from arplus.kernels.dropout import dropout
from arplus.model.ops import Operations
from arplus.torch_private import onednn_linear

# oneDNN compiles kernels for every shape that it sees, 2 ms each, and would keep 1,024 of them: a seventh of the memory
# of a process that has seen 45 shapes of batches. Within a step, where they are used again, 64 are enough. Read lazily.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

LEAST = 1 << 25
"""Multiplications for which oneDNN pays: for each shape that it has not seen it compiles for a millisecond or two, and
packed batches are of new shapes every time. With a quarter of this the steps of ``arplus --tiny`` took 1.3 times as
long."""


class CpuOperations(Operations):
    """fp32 products by oneDNN, and cheaper random numbers."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By oneDNN where it pays."""
        if not _is_onednns(x, weight):
            return super().linear(x, weight, bias)
        y: Tensor = _OneDnnLinear.apply(x, weight, bias)
        return y

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """From a random number per dropped element."""
        return dropout(x, p)

    def attend(self, query_HBTC: Tensor, key_HBSC: Tensor, value_HBSC: Tensor, mask: Tensor | None, p: float) -> Tensor:
        """By plain products under dropout, where torch has no fused kernel, and for single queries, where it is slow.

        For 64 queries and 63 positions it takes 2.3 ms, these products 0.8.
        """
        if not p and query_HBTC.shape[2] > 1:
            return super().attend(query_HBTC, key_HBSC, value_HBSC, mask, p)
        score_HBTS = (query_HBTC * query_HBTC.shape[-1] ** -0.5) @ key_HBSC.transpose(-1, -2)
        weight_HBTS = (score_HBTS if mask is None else score_HBTS.add_(mask)).softmax(-1)
        return (self.dropout(weight_HBTS, p) if p else weight_HBTS) @ value_HBSC


def _is_onednns(x: Tensor, weight: Tensor) -> bool:
    return (
        {x.dtype, weight.dtype} == {torch.float32}
        and not torch.is_autocast_enabled("cpu")
        and x.numel() * len(weight) >= LEAST
        and torch.backends.mkldnn.is_available()
    )


class _OneDnnLinear(torch.autograd.Function):
    """The product with its gradients; that to the weight is MKL's, which is faster at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        d_x = onednn_linear(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        d_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, flat.sum(0) if ctx.needs_input_grad[2] else None
