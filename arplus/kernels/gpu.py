"""What is to be set and known on GPUs, which have no operations of ours: they compute those of ``model/ops.py``.

By torch's kernels, or torch.compile's. A kernel that a GPU has shown to pay goes beside ``cpu.py``, and into
:data:`arplus.kernels.BACKENDS`.
"""

import torch


def leave_cudnn_out() -> None:
    """Has attention on GPUs take torch's own kernels in this process; workers, evaluators and benchmarks begin with it.

    From sm_90 on torch prefers cuDNN's. Some of them round a dropout of 0.1 to sixteenths (pytorch/pytorch#174245), and
    without dropout they make a plan for every shape, about 30 ms each.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


def has_bf16(device: torch.device) -> bool:
    """Whether it is a GPU with bf16 of its own, not emulated."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
