"""What this project takes of DeepSpeed that is not documented: a function each, as read in DeepSpeed 0.19.8.

``tests/test_upgrades.py`` says which of it an upgrade moved. Then read again what each function relies on, and set
READ_IN.
"""

from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.comm import comm
from torch import Tensor

READ_IN = "0.19.8"
"""The version in which all of this was read."""


def leave_shm_out() -> None:
    """``init_distributed`` would compile an operator for CPUs with g++, for up to 84 s, and fail where there is none.

    deepspeedai/DeepSpeed#7108 is such a failure.
    """
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def reduce_gradients(engine: Any, wanted: bool) -> None:
    """Whether stage 0 adds gradients up over the workers. It flattens and copies them all, for one worker too."""
    engine.enable_backward_allreduce = wanted


def tell_before_reduction(engine: Any, tell: Callable[[], None]) -> None:
    """Calls ``tell`` when a backward pass is over and its gradients are about to be added up over the workers.

    Stages 2 and 3 have added most of them up by then. DeepSpeed offers no hook between the two.
    """
    reduce = engine.allreduce_gradients

    def told(*arguments: Any, **named: Any) -> None:
        tell()
        reduce(*arguments, **named)

    engine.allreduce_gradients = told


def data_parallel_group(engine: Any) -> dist.ProcessGroup:
    """The group in which gradients are added up: DeepSpeed's own clone of torch's, with torch's default timeout."""
    group: dist.ProcessGroup = engine.seq_data_parallel_group
    return group


def fp32_partitions(optimizer: Any, stage: int) -> list[Tensor]:
    """The flat fp32 parts of the weights that this worker has under ZeRO; the optimizer keeps its state by them."""
    return list(optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups)


def link_moments(optimizer: Any, stage: int) -> None:
    """Lets ``safe_set_full_optimizer_state`` find moments that were set before the first step.

    Stages 1 and 2 link parameters with their parts of the state only at that step (deepspeedai/DeepSpeed#5104).
    """
    if stage in (1, 2):
        optimizer._lazy_init_hp_params_optimizer_state()


def full_shape(parameter: Tensor) -> Any:
    """A parameter's shape; under ZeRO-3 the tensor itself is empty between two uses."""
    return getattr(parameter, "ds_shape", parameter.shape)


def end_groups() -> None:
    """Ends the process group in DeepSpeed's eyes too.

    It keeps groups of its own beside torch's, and an engine made later would talk to one that is gone.
    """
    if comm.cdb is None:  # no engine was made
        dist.destroy_process_group()
    else:
        comm.destroy_process_group()
        comm.cdb = None
