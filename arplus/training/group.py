"""A process group for whoever trains without Ray Train, which has its own: benchmarks and tests."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def process_group(rank: int = 0, workers: int = 1, rendezvous: Path | None = None) -> Iterator[None]:
    """Makes this process worker ``rank`` of ``workers``, which meet at the file ``rendezvous``; one alone needs none.

    At the end it is of no group any more, in DeepSpeed's eyes too.
    """
    variables = {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)}  # DeepSpeed looks for them
    before = {name: os.environ.get(name) for name in variables}
    meeting: dict[str, Any] = {"store": dist.HashStore()}
    if rendezvous is not None:
        meeting = {"init_method": rendezvous.absolute().as_uri()}
    os.environ |= variables
    try:
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=workers, **meeting
        )
        try:
            yield
        finally:
            _end()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _end() -> None:
    if "deepspeed" in sys.modules:
        from arplus.training import deepspeed_private  # seconds, for whoever made no engine

        deepspeed_private.end_groups()
    else:
        dist.destroy_process_group()
