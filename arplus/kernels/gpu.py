"""Operations on GPUs. torch's kernels and torch.compile's do but for the losses, whose logits would be the largest."""

import torch
from torch import Tensor

from arplus.kernels.cross_entropy import linear_cross_entropies
from arplus.model.ops import Operations

ROWS = 8192
"""Rows of logits at a time: 156 MB in bf16, and twice that for their softmax."""


def leave_cudnn_out() -> None:
    """Has attention on GPUs take torch's own kernels in this process; workers, evaluators and benchmarks begin with it.

    From sm_90 on torch prefers cuDNN's. Some of them round a dropout of 0.1 to sixteenths (pytorch/pytorch#174245), and
    without dropout they make a plan for every shape, about 30 ms each.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU with bf16 of its own, not emulated."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


class GpuOperations(Operations):
    """Nothing of it was measured on a GPU yet."""

    def cross_entropies(self, hidden_GND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
        """Logits never exist as a whole, but in a compiled step, whose compiler sees to them."""
        if torch.compiler.is_compiling():
            return super().cross_entropies(hidden_GND, weight_VD, target_N)
        return linear_cross_entropies(hidden_GND, weight_VD, target_N, linear=self.linear, rows=ROWS, at_once=ROWS)
