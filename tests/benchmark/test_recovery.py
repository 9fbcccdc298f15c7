"""The benchmark of a failure reads a run's record rightly, and measures a real kill."""

import json
from pathlib import Path

import pytest

from arplus.benchmark import recovery
from arplus.benchmark.options import FaultsBenchmark
from arplus.benchmark.recovery import Recovery
from arplus.errors import RunError

BATCH = 8


def event(second: float, step: int) -> dict[str, object]:
    return {"key": "train/loss", "value": 1.0, "step": step * BATCH, "timestamp": round(second * 1000)}


def test_the_first_new_step_is_the_first_that_goes_back() -> None:
    """Step 6 ends after the kill, by the worker that lives on; the new workers go on from the checkpoint at step 4."""
    events = [*(event(i, i) for i in range(1, 6)), event(5.9, 6), event(20, 5), event(21, 6), event(22, 7)]
    assert recovery.recovery_after(5.5, events, BATCH) == Recovery(14.5, 2)


def test_a_run_that_nothing_happened_to_has_no_figure() -> None:
    with pytest.raises(RunError, match="no step was trained again"):
        recovery.recovery_after(2.5, [event(i, i) for i in range(1, 6)], BATCH)


def test_a_line_that_is_being_written_is_left_out(tmp_path: Path) -> None:
    record = tmp_path / "tracking.jsonl"
    assert recovery.read_events(record) == []
    record.write_text(json.dumps(event(1, 1)) + "\n" + '{"key": "tra')
    assert recovery.read_events(record) == [event(1, 1)]


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.usefixtures("ray_cluster")
def test_a_real_kill() -> None:
    """About a minute."""
    config = FaultsBenchmark(tiny=True, steps=60)
    figures = recovery.measure(config).figures
    found = {name: value for name, value in figures.items() if value is not None}
    assert found.keys() == figures.keys()
    assert found["kill_to_first_step_seconds"] > 1, "it takes Ray some seconds to see it and to start workers"
    assert 1 <= found["repeated_steps"] <= 60
    assert 0 < found["checkpoint_share"] < 1
    assert found["checkpoint_bytes"] > 1e6
