"""A worker that holds up the others is named: in the log line while it is slow, in the error when it does not come."""

import multiprocessing
from pathlib import Path

import pytest
from helpers import engine_worker
from helpers.hang_worker import SLOW_S, slow_then_gone

from arplus.runs.checkpoint import TrainProgress
from arplus.training.group import process_group
from arplus.training.hooks.console import describe


@pytest.mark.usefixtures("one_thread")
def test_a_slow_worker_and_a_missing_one_are_named(tmp_path: Path) -> None:
    """The others wait in DeepSpeed's own group, which is given the run's timeout too."""
    meeting, result = tmp_path / "meeting", tmp_path / "result"
    other = multiprocessing.get_context("spawn").Process(
        target=engine_worker.run, args=(1, 2, meeting, slow_then_gone, (3,), result)
    )
    other.start()
    with process_group(0, 2, meeting):
        metrics, said = slow_then_gone(3)
    other.join()
    assert metrics["perf/slowest_rank"] == 1
    slowest, median = metrics["perf/slowest_rank_seconds"], metrics["perf/median_rank_seconds"]
    assert slowest > SLOW_S
    assert 0 < median < slowest - SLOW_S / 2, "its wait for the other is not its own time"
    line = describe(TrainProgress(fingerprint="", step=3), metrics, 4)
    assert f"| worker 1 slow ({slowest:.3f} s per step, median {median:.3f} s) |" in line
    assert "no answer for 0.05 minutes (--collective-timeout-minutes): worker 1 on " in said
    assert "waits for the data of step 4, while the others wait (worker 0 adds up the gradients of step 4)" in said
