"""What this project takes of torch that is not public: a function each, as read in torch 2.13.0.

``tests/test_upgrades.py`` says which of it an upgrade moved. Then read again what each function relies on, and set
READ_IN.
"""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

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


def default_store() -> dist.Store:
    """The store by which the workers of the default process group met."""
    return distributed_c10d._get_default_store()


def set_timeout(timeout: timedelta, group: dist.ProcessGroup) -> None:
    """Sets how long collectives of a group that is there already may take; ``new_group`` alone would let us say so."""
    distributed_c10d._set_pg_timeout(timeout, group)


def record_allocations(most: int) -> None:
    """Has the GPU's allocator remember what it does, as in pytorch.org/docs/stable/torch_cuda_memory.html."""
    torch.cuda.memory._record_memory_history(max_entries=most)


def dump_allocations(path: str) -> None:
    """Writes what it remembers to a file, and has it remember no more."""
    torch.cuda.memory._dump_snapshot(path)
    torch.cuda.memory._record_memory_history(enabled=None)
