"""The engine on a GPU: at every stage, in bf16, compiled, after a stop, what it computes on a CPU; without waiting."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers.engine_worker import (
    DEVICE,
    NOISE,
    after_a_bad_step,
    config,
    curves,
    cut_and_whole,
    dtypes_of_products,
    engine_steps,
    initial_model,
    plain_run,
    rates,
    results,
)

from arplus.config import ExampleRules, TrainConfig
from arplus.data.capacity import Filler
from arplus.data.loader import Step
from arplus.training.engine import Engine
from arplus.training.loop import seed_dropout

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("group")]
STEPS = 12


def eager(preset: str = "arplus", **changes: Any) -> TrainConfig:
    """A run in fp32 whose step is not compiled, unless told otherwise."""
    settings: dict[str, Any] = {"compile": "off", "precision": "fp32"}
    return config(preset, **settings | changes)


def dropping(**changes: Any) -> TrainConfig:
    """A run with dropout whose weights all but stay."""
    c = config(zero_stage=0, **changes)
    return replace(c, model=replace(c.model, dropout=0.1), optimizer=replace(c.optimizer, lr=1e-9, min_lr=1e-9))


def filled(c: TrainConfig, count: int) -> list[Step]:
    """The first steps with batches of one shape, as compiled steps get them, in pinned memory where there is any."""
    steps = engine_steps(c, 0, count)
    fill = Filler(ExampleRules(), c.micro_batch_size(1))
    batches = iter(fill([batch for step in steps for batch in step.micro_batches], pin=DEVICE.type == "cuda"))
    return [step._replace(micro_batches=[next(batches) for _ in step.micro_batches]) for step in steps]


@contextlib.contextmanager
def without_waiting() -> Iterator[None]:
    """Makes it an error to wait for the GPU."""
    if DEVICE.type == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("preset", ["arplus", "ar", "no-rezero", "arplus-weighted"])
def test_every_stage_follows_the_plain_curve(preset: str) -> None:
    reference = torch.tensor(plain_run(config(preset), STEPS)[0])
    assert reference[-1] < reference[0] - 0.1, "the reference must learn, or equal curves would mean nothing"
    stages = [eager(preset, zero_stage=stage) for stage in range(4)]
    stages += [eager(preset, zero_stage=stage, gradient_accumulation_steps=2) for stage in (0, 3)]
    for curve in curves(stages, STEPS):
        assert (torch.tensor(curve) - reference).abs().max() <= 1e-3


def test_bf16_is_used_at_every_stage() -> None:
    stages = [eager(zero_stage=stage, precision="bf16") for stage in range(4)]
    assert dtypes_of_products(stages) == [["torch.bfloat16"] * 2] * 4


def test_bf16_ends_where_fp32_does_within_what_a_seed_changes() -> None:
    def ends(precision: str) -> torch.Tensor:
        runs = [eager(precision=precision, seed=seed, zero_stage=0) for seed in range(5)]
        return torch.tensor(curves(runs, 40))[:, -10:].mean(1)

    full, half = ends("fp32"), ends("bf16")
    assert 0 < (half - full).abs().max() < full.std()


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_step_does_not_wait_for_the_gpu(compiled: str) -> None:
    c = dropping(compile=compiled)
    engine = Engine(initial_model(c), c, DEVICE)
    first, *others = filled(c, 4)
    for _ in range(4):  # until it is compiled, and recorded
        engine.train_step(first)
    engine.read()
    with without_waiting():
        for number, step in enumerate(others):
            seed_dropout(c.seed, number)
            engine.train_step(step)
    assert len(engine.read()[0]) == 3


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_compiled_step_computes_what_an_eager_one_does(accumulation: int) -> None:
    found, validated = [], []
    for compiled in ("off", "on"):
        c = eager(compile=compiled, gradient_accumulation_steps=accumulation, zero_stage=0)
        engine = Engine(initial_model(c), c, DEVICE)
        steps = filled(c, 6)
        found.append(torch.tensor([(r.loss, r.grad_norm) for r in results(engine, steps)]))
        validated.append(engine.evaluate(steps[0].micro_batches[0]).together())
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(validated[1], validated[0], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("compiled", ["off", "on"])
def test_a_steps_dropout_is_that_of_its_seed(compiled: str) -> None:
    """Also of a step that is recorded once and repeated."""
    c = dropping(compile=compiled, precision="fp32")
    engine = Engine(initial_model(c), c, DEVICE)
    (step,) = filled(c, 1)
    losses = []
    for seed in (1, 2, 3, 1, 2, 3, 4):
        seed_dropout(seed, 0)
        losses += [result.loss for result in results(engine, [step])]
    assert losses[3:6] == pytest.approx(losses[:3], abs=1e-5)
    assert min(abs(a - b) for i, a in enumerate(losses[3:]) for b in losses[3 : 3 + i]) > 1e-5


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_reaches_no_weights(bad: str) -> None:
    for said, index, same in after_a_bad_step([eager(zero_stage=stage) for stage in range(4)], bad):
        assert said.startswith("loss inf" if bad == "loss" else "gradient norm")
        assert (index, same) == (1, True)


def test_a_run_goes_on_as_if_it_had_not_been_stopped() -> None:
    for (before, after), whole in cut_and_whole([eager(zero_stage=stage) for stage in range(4)]):
        assert before["curve"] + after["curve"] == pytest.approx(whole["curve"], abs=NOISE)
        for kind in ("weights", "moments"):
            for name, value in whole[kind].items():
                torch.testing.assert_close(after[kind][name], value, atol=NOISE, rtol=NOISE, msg=name)
        assert after["schedule"] == pytest.approx(whole["schedule"], abs=NOISE)


def test_the_plateau_schedule_is_exact_however_seldom_losses_are_read() -> None:
    c = eager(zero_stage=0)
    c = replace(c, optimizer=replace(c.optimizer, lr=0.1, plateau_patience=3))
    (each, readings), (seldom, fewer) = rates(c, 40, True), rates(c, 40, False)
    assert [rate for _, rate in each] == [rate for _, rate in seldom]
    assert fewer < readings == 40
