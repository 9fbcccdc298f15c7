"""How many runs fit side by side: the arithmetic, and the sum in its refusals."""

from dataclasses import replace
from typing import Any

import pytest

from arplus.config import TuneConfig, VocabularySizes, preset, with_values
from arplus.errors import ResourceError
from arplus.study.slots import Slots, fit, stored_bytes
from arplus.training.footprint import checkpoint_bytes, run_bytes, weight_bytes

CONFIG = TuneConfig()


@pytest.mark.parametrize(
    ("changes", "runs", "cpus", "gpus", "expected"),
    [
        ({}, 8, 2, 0, (1, 1.0)),  # whole CPUs by default
        ({}, 8, 16, 0, (8, 1.0)),  # no more than there are
        ({}, 99, 16, 0, (15, 1.0)),
        ({"workers": 4}, 99, 16, 0, (3, 1.0)),
        ({"workers": 4}, 99, 3, 0, (1, 0.5)),  # one run is never refused for want of whole CPUs
        ({"concurrency": 2}, 99, 2, 0, (2, 0.5)),
        ({"concurrency": 4}, 99, 2, 0, (4, 0.25)),
        ({"cpus_per_worker": 0.25}, 99, 2, 0, (4, 0.25)),
        ({"cpus_per_worker": 3}, 99, 16, 0, (5, 3.0)),
        ({}, 99, 16, 8, (8, 1.0)),  # a GPU a worker
        ({"workers": 2}, 99, 64, 8, (4, 1.0)),
        ({"workers": 4}, 99, 5, 8, (2, 0.5)),
        ({"workers": "1:4"}, 99, 64, 8, (2, 1.0)),  # room for the most that a run may have
        ({"gpus_per_worker": 0.25}, 99, 64, 2, (8, 1.0)),  # four share each GPU
        ({"gpus_per_worker": 0.25}, 6, 64, 2, (6, 1.0)),
        ({"gpus_per_worker": 0.25}, 99, 5, 2, (8, 0.5)),
        ({"gpus_per_worker": 0.6}, 99, 64, 2, (2, 1.0)),
        ({"gpus_per_worker": 0.25}, 99, 2, 0, (1, 1.0)),  # on CPUs nothing changes
    ],
)
def test_runs_side_by_side(
    changes: dict[str, Any], runs: int, cpus: float, gpus: int, expected: tuple[int, float]
) -> None:
    config = with_values(CONFIG, changes, source="test")
    room = fit(config, runs, cpus, gpus)
    assert room == (*expected, "gpu" if gpus else "cpu")
    used = room.side_by_side * config.run.world_sizes[-1]
    assert used * room.cpus_per_worker + 1 <= cpus
    assert not gpus or used * config.run.placement.gpus_per_worker <= gpus


def test_workers_stay_within_the_nodes_that_qualify() -> None:
    """Of 16 CPUs 4 are where workers may be; the feed has one of the others."""
    config = with_values(CONFIG, {"label_selector": ["zone=a"]}, source="test")
    assert fit(config, 99, 16, 0, within=4) == (4, 1.0, "cpu")
    assert fit(config, 99, 5, 0, within=4)[:2] == (4, 1.0)
    assert fit(config, 99, 4, 0, within=4)[:2] == (3, 1.0)
    four = with_values(config, {"workers": 4, "cpus_per_worker": 2}, source="test")
    with pytest.raises(ResourceError, match=r"has 16, 4 of them where workers may be \(--label-selector zone=a\)"):
        fit(four, 99, 16, 0, within=4)


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "expected"),
    [
        ({"workers": 4}, 4, 0, (1, 0.5)),
        ({"workers": 2, "concurrency": 3}, 6, 0, (3, 0.6666)),
        ({}, 8, 8, (8, 0.75)),
        ({}, 2, 0, (1, 0.2)),
    ],
)
def test_one_of_two_nodes_has_a_whole_cpu_left(
    changes: dict[str, Any], cpus: float, gpus: int, expected: tuple[int, float]
) -> None:
    """Wherever the workers go; so little is left of two nodes of one CPU that it takes the fewest."""
    assert fit(with_values(CONFIG, changes, source="test"), 99, cpus, gpus, nodes=2)[:2] == expected


@pytest.mark.parametrize(
    ("changes", "cpus", "gpus", "message"),
    [
        ({}, 1, 0, r"--workers 1: 1 run\(s\) side by side × 1 workers × 0.2 CPUs \+ 1 CPU for .* = 1.2 CPUs, and"),
        ({"workers": 8}, 2, 0, r"8 workers × 0.2 CPUs \+ 1 CPU for the data feed = 2.6 CPUs"),
        ({"cpus_per_worker": 4}, 4, 0, r"1 workers × 4 CPUs \+ 1 CPU for the .* = 5 CPUs, and the cluster has 4"),
        ({"concurrency": 9}, 2, 0, r"--workers 1 --concurrency 9: 9 run\(s\) .* = 2.8 CPUs"),
        (
            {"gpus_per_worker": 0.5, "concurrency": 5},
            64,
            2,
            r"--concurrency 5: 5 run\(s\) side by side × 1 workers × 0.5 GPU = 2.5 GPUs, and the cluster has 2 alive",
        ),
        ({"workers": 4}, 64, 2, r"1 run\(s\) side by side × 4 workers × 1 GPU = 4 GPUs, and the cluster has 2"),
    ],
)  # fmt: skip
def test_a_cluster_that_is_too_small_is_refused_with_the_sum(
    changes: dict[str, Any], cpus: float, gpus: int, message: str
) -> None:
    with pytest.raises(ResourceError, match=message):
        fit(with_values(CONFIG, changes, source="test"), 8, cpus, gpus)


def test_the_jobs_own_driver_takes_its_share() -> None:
    assert fit(CONFIG, 8, 4, 0, driver=1.0) == (2, 1.0, "cpu")
    with pytest.raises(ResourceError, match=r"\+ 1 CPU for the data feed \+ 1 CPUs for the job's driver .* = 2.2 CPUs"):
        fit(CONFIG, 8, 2, 0, driver=1.0)


def test_room_is_asked_for_what_is_there_at_one_time() -> None:
    """Of two runs that train and the best one all that a run keeps, of the others their weights."""
    run, slots, sizes = CONFIG.run, Slots(2, 1.0, "cpu"), VocabularySizes()
    weights = 4 * 31_142_449
    assert run_bytes(run, sizes) == 4 * 3 * weights, "two newest, the best, and one that is being written"
    assert stored_bytes([(run, 63)], slots, sizes) == 3 * 12 * weights + 60 * weights
    assert stored_bytes([(run, 2)], slots, sizes) == 2 * 12 * weights
    everything = replace(run, keep_checkpoints="all")
    assert stored_bytes([(everything, 63)], slots, sizes) == 63 * 9 * weights
    large = replace(run, model=preset("arplus-large").model)
    more = stored_bytes([(large, 1), (run, 62)], slots, sizes) - stored_bytes([(run, 63)], slots, sizes)
    assert more == run_bytes(large, sizes) - run_bytes(run, sizes), "whichever is the best"
    gates = replace(run, optimizer=replace(run.optimizer, only=("norms and gates",)))
    assert weight_bytes(gates, sizes) == weights
    assert weights < checkpoint_bytes(run.model, sizes, ("norms and gates",)) < 1.01 * weights
