"""Fixtures of the training's tests."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import engine_worker


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., Any]:
    """Runs a task in a fresh process group of ``world`` gloo processes and returns rank 0's result."""

    def run(world: int, task: Callable[..., Any], *arguments: Any) -> Any:
        name = uuid.uuid4().hex
        result = tmp_path / f"{name}.pt"
        mp.spawn(engine_worker.run, (world, tmp_path / name, task, arguments, result), nprocs=world)
        return torch.load(result)

    return run
