"""MFU counts the arithmetic of real tokens, whatever fills a batch up, and so do the losses of a validation."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.engine_worker import SIZES, config, engine_steps, initial_model

from arplus.config import ExampleRules
from arplus.data.capacity import Capacity, fill
from arplus.data.loader import RankLoader, Step
from arplus.model.cost import forward_backward_flops
from arplus.runs.checkpoint import TrainProgress
from arplus.training.engine import Engine, StepResult
from arplus.training.group import process_group
from arplus.training.hooks.console import describe
from arplus.training.loop import validate
from arplus.training.meter import Meter, Tokens

PEAK = 1e8
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """This process as the only worker."""
    with process_group():
        yield


def filled(step: Step) -> Step:
    """The same step with batches that are filled up, as for a compiled model."""
    return Step([fill(b, Capacity.needed(b).grown(), 9, ExampleRules()) for b in step.micro_batches], *step[1:])


def test_mfu_is_the_real_tokens_arithmetic_over_the_peak() -> None:
    c = config()
    steps = engine_steps(c, 0, 3)
    tokens, plain = Tokens(), Tokens()
    for step in steps:
        tokens.add(filled(step))
        plain.add(step)
    assert tokens == plain
    assert (tokens.examples, tokens.targets) == (24, sum(step.targets for step in steps))
    meter = Meter(total_steps=10, config=c, sizes=SIZES, device=CPU, peak_flops=PEAK)
    assert len(list(meter.measure(map(filled, steps)))) == 3
    meter.add([StepResult(1.0, 1.0, 1.0, 1.0, 0.1)] * 3)
    metrics = meter.take(TrainProgress(fingerprint="", step=3))
    lengths = {"context": tokens.context / 24, "persona": tokens.persona / 24, "targets": tokens.targets / 24}
    rate = metrics["perf/examples_per_second"]
    assert metrics["perf/mfu"] == pytest.approx(rate * forward_backward_flops(c.model, SIZES, **lengths) / PEAK)
    assert f"| MFU {metrics['perf/mfu']:.1%} |" in describe(TrainProgress(fingerprint=""), metrics, 10)


def test_a_pause_takes_no_step_out_of_the_means_and_no_time() -> None:
    meter = Meter(total_steps=10, config=config(), sizes=SIZES, device=CPU)
    meter.add([StepResult(1.0, 1.0, 1.0, 1.0, 0.1)])
    meter.added -= 100  # a validation that took so many seconds
    meter.started -= 100
    meter.skip_pause()
    meter.add([StepResult(3.0, 1.0, 1.0, 1.0, 0.1)])
    metrics = meter.take(TrainProgress(fingerprint="", step=2))
    assert metrics["train/loss"] == 2
    assert metrics["perf/examples_per_second"] > 2 * config().batch_size / 50


def test_a_validation_divides_by_real_targets() -> None:
    c = replace(config(), zero_stage=0)
    engine = Engine(initial_model(c), c, CPU)

    def found(change: Any) -> dict[str, float] | None:
        steps = [change(step) for step in engine_steps(c, 0, 2)]
        sampler = SimpleNamespace(split=SimpleNamespace(examples=16))
        loader = SimpleNamespace(batches=lambda epoch: (step for step in steps), sampler=sampler)
        return validate(engine, cast(RankLoader, loader), c, lambda: False)

    assert found(filled) == pytest.approx(found(lambda step: step))
