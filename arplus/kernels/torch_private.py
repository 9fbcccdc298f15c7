"""What this project takes of torch that is not public: a function each, as read in torch 2.13.0.

``tests/test_upgrades.py`` says which of it an upgrade moved. Then read again what each function relies on, and set
READ_IN.
"""

import torch
from torch import Tensor

READ_IN = "2.13.0"
"""The version in which all of this was read."""


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer by oneDNN, as ``torch.compile`` emits it: there is no public name for it.

    It reads any bias as contiguous.
    """
    bias = bias if bias is None else bias.contiguous()
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def leave_update_out(optimizer: torch.optim.Optimizer, where: Tensor) -> None:
    """Has a fused optimizer leave its next update out where this is not 0, without waiting for the GPU to know.

    It is what ``torch.amp.GradScaler`` sets, for which there is no other way in.
    """
    optimizer.found_inf = where  # type: ignore[attr-defined]
