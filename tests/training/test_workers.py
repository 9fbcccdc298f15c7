"""What a worker takes of its machine: cores, and no GPU that is not its own."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from arplus.cluster.scaling import size_workers
from arplus.config import TrainConfig, tiny
from arplus.training import workers


@pytest.mark.parametrize(("allowed", "expected"), [(1, 1), (64, 2)])
def test_cores_are_those_allowed_or_those_that_ray_was_given(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, allowed: int, expected: int
) -> None:
    """A container with a quota of two cores sees all of its host's; Ray, and the fixture's cluster, have two."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(allowed)))
    assert workers.cores() == expected


@pytest.mark.parametrize(
    ("config", "workers_of_run", "sharing", "expected"),
    [
        (TrainConfig(), 1, 1, 2),
        (TrainConfig(), 2, 2, 1),  # they share the node
        (tiny(TrainConfig()), 1, 1, 1),
        (replace(tiny(TrainConfig()), batch_size=64), 1, 1, 2),
        (replace(tiny(TrainConfig()), batch_size=64), 2, 1, 1),  # half of it each
        (replace(TrainConfig(), gradient_accumulation_steps=64), 1, 1, 1),
    ],
)
def test_a_small_step_has_one_thread(
    ray_cluster: None, config: TrainConfig, workers_of_run: int, sharing: int, expected: int
) -> None:
    """The fixture's cluster has two cores."""
    assert workers.threads(config, workers_of_run, sharing) == expected


def test_a_worker_has_the_runs_timeout_and_sees_no_gpu_but_its_own(ray_cluster: None, tmp_path: Path) -> None:
    """Ray 2.60 leaves a node's GPUs in sight of workers that took none, as with --device cpu."""

    def sees(_: dict[str, Any]) -> tuple[str | None, float]:
        group: Any = dist.group.WORLD
        timeout = group._get_backend(torch.device("cpu")).options._timeout
        return os.environ.get("CUDA_VISIBLE_DEVICES"), timeout.total_seconds()

    scaling = size_workers(TrainConfig(device="cpu"))
    assert workers.run(sees, {}, scaling, str(tmp_path), timeout_minutes=1.5) == ("", 90)
