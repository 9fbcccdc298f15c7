"""Linear layers: torch's, and in fp32 on the CPU oneDNN's product.

torch multiplies fp32 matrices with MKL there. On an AMD EPYC (Zen 4) that took 17 % longer than oneDNN for the
512-wide layers and 55 % for the generator, whose rows of 9,498 logits do not begin at a cache line; training steps of
batch 64 take 6 to 13 % less with it (two threads, interleaved).
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

# It compiles kernels for every shape that it sees, 2 ms each, and would keep 1,024 of them: a seventh of the memory of
# a process that has seen 45 shapes of batches. Within a step, where they are used again, 64 are enough. Read lazily.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")

_LEAST = 1 << 23
"""Multiplications for which oneDNN pays: with it for smaller ones too the tiny demo trained at 3/4 of its speed."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x · weightᵀ + bias, as :func:`torch.nn.functional.linear`."""
    if not _is_onednns(x, weight, bias):
        return functional.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return _product(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def _is_onednns(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return (
        x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and {x.dtype, weight.dtype} == {torch.float32}
        and not torch.is_autocast_enabled("cpu")
        and x.numel() * len(weight) >= _LEAST
        and torch.backends.mkldnn.is_available()
        and (bias is None or bias.is_contiguous())  # it would read any other bias as if it were
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # What torch.compile emits for a linear layer; there is no public name for it.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class _Linear(torch.autograd.Function):
    """The product with its gradients; that to the weight is MKL's, which is faster at it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (x, weight) = gradients, ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])
        d_x = _product(gradient, weight.t(), None) if ctx.needs_input_grad[0] else None
        d_weight = flat.t() @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        return d_x, d_weight, flat.sum(0) if ctx.has_bias else None


def product_dtype(x: Tensor) -> torch.dtype:
    """What ``x`` would be multiplied in: autocast's dtype, for functions whose own products autocast does not see."""
    device = x.device.type
    # Sizes are computed on the device "meta", which has no autocast.
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else x.dtype


class Linear(nn.Linear):
    """:func:`linear` as a module, initialised as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects the last dimension."""
        return linear(input, self.weight, self.bias)
