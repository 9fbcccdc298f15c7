"""Linear layers: torch's, and without gradients oneDNN's product on the CPU.

torch multiplies fp32 matrices with MKL there. On an AMD EPYC (Zen 4) that took 17 % longer than oneDNN for the
512-wide layers and 55 % for the generator, whose rows of 9,498 logits do not begin at a cache line.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Computes x · weightᵀ + bias, as :func:`torch.nn.functional.linear`."""
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, weight, bias)
    if not torch.backends.mkldnn.is_available() or {x.dtype, weight.dtype} != {torch.float32}:
        return functional.linear(x, weight, bias)
    if bias is not None and not bias.is_contiguous():
        return functional.linear(x, weight, bias)  # the product below reads it as if it were
    # What torch.compile emits for a linear layer; there is no public name for it.
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


class Linear(nn.Linear):
    """:func:`linear` as a module, initialised as torch's."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects the last dimension."""
        return linear(input, self.weight, self.bias)
