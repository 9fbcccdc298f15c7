"""Fixtures of the training's tests."""

import multiprocessing
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from helpers import engine_worker, faults, forks
from helpers.prepared import write_dataset

from arplus.config import TrainConfig
from arplus.runs.folder import FinalMetrics

# Forks of a process that has imported DeepSpeed; CUDA does not outlive a fork.
START = "spawn" if torch.cuda.is_available() else "forkserver"
multiprocessing.set_forkserver_preload([*forks.IMPORTED, "arplus.training.engine"])


@pytest.fixture
def spawn(tmp_path: Path) -> Callable[..., Any]:
    """Runs a task in a fresh process group of ``world`` gloo processes and returns rank 0's result."""

    def run(world: int, task: Callable[..., Any], *arguments: Any) -> Any:
        name = uuid.uuid4().hex
        result = tmp_path / f"{name}.pt"
        started = (engine_worker.run, (world, tmp_path / name, task, arguments, result), world)
        mp.start_processes(*started, start_method=START)
        return torch.load(result)

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of ``faults.EXAMPLES`` training examples, in epochs of 17 steps."""
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[50, 33], [49]], "valid": [[faults.VALID]]}).uri


@pytest.fixture(scope="session")
def finished(
    ray_cluster: None, data: str, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, FinalMetrics]:
    """A run of two workers with dropout that nothing happened to, and its final metrics."""
    from arplus.training.trainer import train

    config = faults.settings(data, tmp_path_factory.mktemp("storage"), run_name="two", profile_steps="3:4")
    config = replace(config, register="a model", tag=("mine=a=b",))
    assert config.model.dropout > 0
    return config, train(config)
