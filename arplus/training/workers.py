"""The processes that train, as Ray Train starts them, and starts them again after failures.

A run and a range test have the same.
"""

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast
from uuid import uuid4

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from arplus import storage
from arplus.cluster import connection
from arplus.config import TrainConfig
from arplus.kernels.gpu import leave_cudnn_out
from arplus.process import in_thread

WORTH_THREADS = 1 << 20
"""Examples of a micro-batch × d² from which a worker on CPUs takes all its cores. OpenMP's threads wait for each other
thousands of times in a step, so that each of Ray's processes beside them makes a small step longer: one of ``arplus
--tiny`` takes 86 ms with one thread and 107 with two, on two cores. Beside another busy process it is 152 and 344."""


def run(
    worker: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    scaling: ScalingConfig,
    uri: str,
    *,
    timeout_minutes: float,
    max_failures: int = 0,
    callbacks: Sequence[ray.train.UserCallback] = (),
) -> Any:
    """Runs ``worker(arguments)`` in every worker to its end, starting all again where one dies; rank 0's return value.

    Ray keeps its own files in the folder ``ray`` of ``uri``. A worker fails where it waits longer than
    ``timeout_minutes`` for the others. Raises :class:`ray.train.TrainingFailedError` where workers failed more than
    ``max_failures`` times.
    """
    filesystem, path = storage.resolve_lasting(storage.join(uri, "ray"))
    trainer: Any = TorchTrainer(
        cast(Any, worker),  # its annotation forbids the return value that it documents
        train_loop_config=arguments,
        torch_config=TorchConfig(timeout_s=math.ceil(60 * timeout_minutes)),
        scaling_config=scaling,
        # Checkpoints are ours, so Ray's own record of a job has a name that no later job resumes from.
        run_config=cast(Any, RunConfig)(  # mypy sees the class of Ray Train v1
            name=f"job-{uuid4().hex[:8]}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=max_failures),
            logging_config=LoggingConfig(log_level="WARNING"),
            worker_runtime_env={"env_vars": _variables(scaling)},
            callbacks=list(callbacks),
        ),
    )
    # In the main thread Ray Train takes Ctrl-C for itself, and ends the run without a checkpoint.
    return in_thread(trainer.fit).return_value


def _variables(scaling: ScalingConfig) -> dict[str, str]:
    """What workers have in their environment."""
    # Ray Train's own print says everything twice, so that a progress bar that has ended begins again.
    own = {"RAY_TRAIN_ENABLE_PRINT_PATCH": "0"}
    # Ray hides no GPU from a worker that has none (ray#54868), and torch and DeepSpeed would take it.
    return own if scaling.use_gpu else own | {"CUDA_VISIBLE_DEVICES": ""}


def set_up(config: TrainConfig, side_by_side: int = 1) -> torch.device:
    """Sets logging, threads and kernels up in a worker; its device. ``side_by_side`` runs share the machine.

    A worker that has a share of a GPU takes no more of its memory: torch keeps what it once took, and the others, not
    the greedy one, would run out of it.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    connection.quiet()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    leave_cudnn_out()
    device = ray.train.torch.get_device()
    gpu_share = config.placement.gpus_per_worker
    if device.type == "cuda" and gpu_share < 1:
        torch.cuda.set_per_process_memory_fraction(gpu_share, device)
    if device.type == "cpu":
        # Ray gives a worker as many threads as logical CPUs; the feed's tasks are light, so take the cores.
        context = ray.train.get_context()
        sharing = context.get_local_world_size() * side_by_side
        torch.set_num_threads(threads(config, context.get_world_size(), sharing))
    return device


def threads(config: TrainConfig, workers: int, sharing: int) -> int:
    """Threads of one of so many workers, ``sharing`` of which have the node's cores: one for small steps."""
    small = config.micro_batch_size(workers) * config.model.d_model**2 < WORTH_THREADS
    return 1 if small else max(cores() // sharing, 1)


def cores() -> int:
    """The cores that this process may use (``taskset``, cpusets), or Ray's CPUs of its node where they are fewer.

    A container with a quota sees all of its host's cores; Ray knows the quota.
    """
    node = ray.get_runtime_context().get_node_id()
    logical = next(n["Resources"].get("CPU", 0) for n in ray.nodes() if n["NodeID"] == node)
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, int(logical))
