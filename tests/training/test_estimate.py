"""What ``--dry-run`` says of memory, hours and cost; its command line is tested with the others."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.prepared import write_dataset

from arplus.config import EstimateConfig, PlacementConfig, TrainConfig, preset, tiny
from arplus.training.estimate import report
from arplus.training.footprint import BYTES

ROWS = ("ZeRO 0", "activations")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """2 epochs of 5 steps of 20 examples on 2 workers: 200 examples."""
    data = write_dataset(tmp_path_factory.mktemp("data"), {"train": [[90]], "valid": [[4]]}).uri
    return replace(tiny(preset("arplus")), data=data, batch_size=20, epochs=2, workers=2)


def hours(config: TrainConfig, **estimate: object) -> str:
    said = report(replace(config, estimate=EstimateConfig(**estimate)))  # type: ignore[arg-type]
    return said[said.index("hours: ") :]


def test_hours_and_cost_follow_a_measured_rate(config: TrainConfig) -> None:
    said = hours(config, examples_per_second=0.01, price=0.5)
    assert said.startswith("hours: 2.8, worker-hours: 5.6, cost: 2.78 at 0.5 each\n")
    assert "(assumed: 0.01 examples/s per worker, as given; " in said
    assert "cost" not in hours(config, examples_per_second=0.01)


def test_a_run_on_fewer_examples_is_counted_by_them(config: TrainConfig) -> None:
    feed = replace(config.feed, max_examples=50)
    assert "steps: 6 (3 per epoch of 50 examples)" in report(replace(config, feed=feed))
    assert "steps: 2 (3 per epoch of 50 examples)" in report(replace(config, feed=feed, max_steps=2))


def test_without_one_the_guess_is_named(config: TrainConfig) -> None:
    assert "10% of the 121 TFLOP/s of an L4, a guess; --estimate.examples-per-second takes" in hours(config)
    slow, fast = (hours(config, gpu="H100", mfu=share, price=1e9) for share in (0.1, 0.2))
    cost = [float(re.search(r"cost: ([\d,.]+)", said)[1].replace(",", "")) for said in (slow, fast)]  # type: ignore[index]
    assert cost[0] == pytest.approx(2 * cost[1])


def test_an_elastic_run_has_a_span_of_hours_and_one_cost(config: TrainConfig) -> None:
    said = hours(replace(config, workers="1:4"), examples_per_second=0.01, price=2.0)
    assert said.startswith("hours: 1.4 to 5.6, worker-hours: 5.6, cost: 11.11 at 2 each\n")


def test_memory_is_told_for_every_stage(config: TrainConfig) -> None:
    said = report(replace(config, workers="1:4", zero_stage=2))
    assert re.search(r"train state, workers: +1 +3 +4\n", said)
    assert [line.split()[:2] for line in said.splitlines() if "ZeRO" in line] == [["ZeRO", str(s)] for s in range(4)]
    assert re.search(r"ZeRO 2 +[\d. ]+ \(this run's\)\n", said)
    assert "20 / 7 / 5 examples of 112 context characters" in said


def test_what_is_frozen_is_counted_and_costs_less() -> None:
    run = preset("arplus")
    run = replace(run, model=replace(run.model, adapter=64))
    optimizer = replace(run.optimizer, only=("adapters", "norms and gates"))
    whole, part = report(run), report(replace(run, optimizer=optimizer))
    assert "\ntrained: " not in whole
    assert "\ntrained: 133,249 of 31,274,673 (0.43%)\n" in part
    for figure in (
        r"per example: ([\d.]+) G",
        *(rf"ZeRO {stage} +([\d.]+)" for stage in range(4)),
        r"activations +([\d.]+)",
    ):
        more, less = (float(re.search(figure, said)[1]) for said in (whole, part))  # type: ignore[index]
        assert less < more, figure


def test_a_gpu_that_runs_share_holds_less_of_what_is_frozen() -> None:
    run = replace(preset("arplus"), placement=PlacementConfig(gpus_per_worker=0.25))
    frozen = replace(run, optimizer=replace(run.optimizer, only=("output head",)))
    whole, part = (
        float(re.search(r"share \(.*\): ([\d.]+) GiB", report(each))[1])  # type: ignore[index]
        for each in (run, frozen)
    )
    state = BYTES * 2 * 4 * (31_142_449 - 9_498 * 512) / 2**30  # moments and gradient, at least, of four runs
    assert whole - part > state + 1, "activations too"


def test_a_gpu_that_runs_share_holds_them_all(config: TrainConfig) -> None:
    one = replace(config, workers=1)
    shared = replace(one, placement=PlacementConfig(gpus_per_worker=0.25))
    (line,) = set(report(shared).splitlines()) - set(report(one).splitlines()) - {'  "gpus_per_worker": 0.25,'}
    found = re.fullmatch(r"memory of a GPU that 4 runs share \(--gpus-per-worker 0.25\): ([\d.]+) GiB, and .*", line)
    assert found
    state, activations = (float(re.search(rf"^  {row} +([\d.]+)", report(one), re.M)[1]) for row in ROWS)  # type: ignore[index]
    assert float(found[1]) == pytest.approx(4 * (state + activations), abs=0.05)
    two = report(replace(shared, workers=2))
    assert "on GPUs this would be refused: --gpus-per-worker lets Ray put several workers of one run on one GPU" in two


def test_without_data_steps_are_unknown(tmp_path: Path) -> None:
    assert report(tiny(preset("ar"))).endswith("steps, hours and cost: unknown without --data")


def test_the_larger_preset_has_300_million_parameters_in_groups() -> None:
    large = preset("arplus-large")
    assert "live parameters: 296,282,124\n" in report(large)
    assert (large.model.unique_layers, large.model.repeats) == (12, 2)
