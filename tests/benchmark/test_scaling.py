"""The scale benchmark: its arithmetic by hand, and two real workers."""

import os
from dataclasses import replace

import pytest
from test_step_speed import TINY

from arplus.benchmark import scaling
from arplus.benchmark.options import ScaleBenchmark
from arplus.benchmark.scaling import Costs, bytes_sent, predict, step_seconds
from arplus.benchmark.step_speed import run_config


def test_bytes_by_stage() -> None:
    assert [bytes_sent(stage, 1, 1000) for stage in range(4)] == [0, 0, 0, 0]
    assert [bytes_sent(stage, 2, 1000) for stage in range(4)] == [4000, 4000, 4000, 6000]
    assert bytes_sent(1, 64, 1000) == pytest.approx(2 * 4000 * 63 / 64)


def test_a_step_is_the_sum_of_its_parts_and_waits_for_the_feed() -> None:
    costs = Costs(fixed=1.0, example=0.5, bandwidth=1000.0, latency=0.1)
    assert step_seconds(costs, 1, 1, 4, 1000) == pytest.approx(3.0)
    assert step_seconds(costs, 1, 2, 4, 1000) == pytest.approx(3.0 + 4.0 + 0.3)
    assert step_seconds(replace(costs, feed=0.1), 1, 1, 4, 1000) == pytest.approx(40.0)
    assert step_seconds(replace(costs, feed=0.1), 1, 2, 4, 1000) == pytest.approx(80.0), (
        "the feed's rate is that of all workers"
    )
    assert step_seconds(replace(costs, checkpoint=0.5), 1, 1, 4, 1000) == pytest.approx(6.0)


def test_more_gpus_bring_more_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each window is read once, so the feed is as fast as the cores of all GPUs; before, it was that of one."""
    slow = ScaleBenchmark(gpu_examples_per_second=1e6, feed_cores=1, feed_examples_per_second=1e5)
    monkeypatch.setattr(scaling, "CHECKPOINT_S", 0.0)
    assert [predict(slow, 1, w, 10**6) for w in (1, 8, 64)] == pytest.approx([1e5, 8e5, 64e5])


def gpus_seen(rank: int) -> tuple[int, str]:
    return rank, os.environ["CUDA_VISIBLE_DEVICES"]


@pytest.mark.processes
def test_processes_that_share_a_machine_see_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of them would take the same one, or one that is not there."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert scaling.in_processes(1, gpus_seen) == (0, "")
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.soak
def test_two_workers_are_measured_and_more_predicted() -> None:
    """Half a minute."""
    run = replace(run_config(4, precision="fp32"), model=TINY)
    result = scaling.measure(ScaleBenchmark(batch_size=4, steps=2), run)
    found = result.figures
    assert found["examples_per_second_1"] > 0
    assert found["examples_per_second_2"] > 0
    assert found["prediction_error_2"] == pytest.approx(found["predicted_2"] / found["examples_per_second_2"] - 1)
    gpus = [found[f"predicted_gpus_{w}"] for w in scaling.WORKERS]
    assert gpus == sorted(gpus)
    assert gpus[0] == pytest.approx(15_250, rel=0.01)
    assert all(value <= w * gpus[0] for w, value in zip(scaling.WORKERS, gpus, strict=True))
    assert any("nothing of it is measured" in text for _, text in result.table)
    assert any("a guess for an H100" in text for _, text in result.table)
