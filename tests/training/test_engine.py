"""ZeRO stages, accumulation and workers compute what one plain process computes; state fits any of them."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.engine_worker import (
    CHARACTERS,
    after_a_bad_step,
    config,
    curves,
    cut_and_whole,
    dtypes_of_products,
    initial_model,
    large_curves,
    plain_run,
    rates,
    second_stage,
    train_parts,
)
from helpers.pretrained import SPECIALS, make_pretrained

from arplus.config import FeaturesConfig, TrainConfig
from arplus.model.cost import component_of
from arplus.pretrained.features import resolved
from arplus.training.engine import bf16_is_used, is_compiled

STEPS = 12


@pytest.mark.parametrize("name", ["arplus", "ar", "unshared", "second stage", "arplus-weighted"])
def test_stages_workers_and_accumulation_follow_the_plain_curve(spawn: Callable, name: str) -> None:
    def made(**changes: Any) -> TrainConfig:
        return second_stage(config(**changes)) if name == "second stage" else config(name, **changes)

    reference = torch.tensor(plain_run(made(), STEPS)[0])
    assert reference[-1] < reference[0] - 0.1, "the reference must learn, or equal curves would mean nothing"
    two = [made(workers=2, zero_stage=stage) for stage in range(4)]
    found = spawn(2, curves, [*two, made(workers=2, gradient_accumulation_steps=2, zero_stage=2)], STEPS)
    twice = [made(gradient_accumulation_steps=2, zero_stage=stage) for stage in (0, 3)]
    found += spawn(1, curves, twice, STEPS)
    for curve in found:
        assert (torch.tensor(curve) - reference).abs().max() <= 1e-4


@pytest.mark.parametrize("use", ["replace", "encoder"])
def test_features_of_a_frozen_model_are_the_same_at_every_stage(spawn: Callable, tmp_path: Path, use: str) -> None:
    make_pretrained(tmp_path, "Electra", [*SPECIALS, *CHARACTERS.tokens])
    features: Any = {"path": str(tmp_path), "use": use, "layers": "-1,-2", "combine": "weighted"}
    start = config()
    start = replace(start, model=resolved(replace(start.model, features=FeaturesConfig(**features))))
    reference = torch.tensor(plain_run(start, 8)[0])
    assert reference[-1] < reference[0] - 0.1
    for curve in spawn(2, curves, [replace(start, workers=2, zero_stage=stage) for stage in range(4)], 8):
        assert (torch.tensor(curve) - reference).abs().max() <= 1e-4


def test_dropout_is_the_same_at_every_stage(spawn: Callable) -> None:
    """What computes its backward pass itself finds its weights gathered at stage 3, too."""
    start = config()
    dropping = replace(start, model=replace(start.model, dropout=0.1, ff_bottleneck=8))
    stages = [replace(dropping, zero_stage=stage) for stage in (0, 3)]
    plain, gathered = (torch.tensor(curve) for curve in spawn(1, large_curves, stages, 8))
    assert (plain - gathered).abs().max() <= 1e-4
    assert (plain - torch.tensor(plain_run(start, 8)[0])).abs().max() > 1e-3
    two = spawn(2, large_curves, [replace(stage, workers=2) for stage in stages], 8)
    assert (torch.tensor(two[0]) - torch.tensor(two[1])).abs().max() <= 1e-4


def test_auto_takes_no_bf16_that_a_gpu_only_emulates(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a T4 does, whose products in bf16 are slower than in fp32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert not bf16_is_used("auto", torch.device("cuda"))
    assert bf16_is_used("bf16", torch.device("cuda"))


def test_a_step_is_compiled_on_gpus_that_have_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(shutil, "which", lambda name: f"/bin/{name}")
    assert is_compiled(config(), gpu)
    assert not is_compiled(config(), cpu)
    assert not is_compiled(config(zero_stage=3), gpu)
    assert not is_compiled(config(compile="off"), gpu)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert not is_compiled(config(), gpu)
    assert is_compiled(config(compile="on"), gpu)


def test_bf16_is_used_at_every_stage(spawn: Callable) -> None:
    """DeepSpeed switches an autocast off that it did not switch on itself."""
    stages = [config(zero_stage=stage, precision="bf16") for stage in range(4)]
    assert spawn(1, dtypes_of_products, stages) == [["torch.bfloat16"] * 2] * 4


def test_bf16_follows_the_curve_of_fp32(spawn: Callable) -> None:
    reference = torch.tensor(plain_run(config(), STEPS // 2)[0])
    for curve in spawn(
        2, curves, [config(workers=2, zero_stage=stage, precision="bf16") for stage in (0, 3)], STEPS // 2
    ):
        assert 0 < (torch.tensor(curve) - reference).abs().max() < 0.02


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_step_that_is_not_finite_reaches_no_weights(spawn: Callable, bad: str) -> None:
    """It is one worker's, both leave it out, and it is told although another step was made before anyone looked."""
    for said, index, same in spawn(
        2, after_a_bad_step, [config(workers=2, zero_stage=stage) for stage in range(4)], bad
    ):
        assert said.startswith("loss inf" if bad == "loss" else "gradient norm")
        assert index == 1
        assert same


def test_the_plateau_schedule_is_exact_however_seldom_losses_are_read(spawn: Callable) -> None:
    c = config(zero_stage=0)
    c = replace(c, optimizer=replace(c.optimizer, lr=0.1, plateau_patience=3))
    (each, readings), (seldom, fewer) = spawn(1, rates, c, 40, True), spawn(1, rates, c, 40, False)
    assert each == seldom
    assert len({rate for _, rate in each}) > 3
    assert fewer < readings == 40


def test_the_linear_schedule_waits_for_no_losses(spawn: Callable) -> None:
    c = second_stage(config(zero_stage=0))
    (each, _), (seldom, readings) = spawn(1, rates, c, 12, True), spawn(1, rates, c, 12, False)
    assert each == seldom
    assert readings == 0
    line = [0, 1 / 3, 2 / 3, *(i / 9 for i in range(9, 0, -1))]
    assert [rate for _, rate in each] == pytest.approx([1e-2 * share for share in line])


def test_state_moves_between_worker_counts_and_stages(spawn: Callable) -> None:
    curve, weights = plain_run(config(), 12)
    one, two, four = ([config(workers=n, zero_stage=stage) for stage in range(4)] for n in (1, 2, 4))
    parts = spawn(2, train_parts, [(two[1], 0, 2), (two[3], 2, 4), (two[0], 4, 6)])
    parts += spawn(1, train_parts, [(one[2], 6, 8), (one[3], 8, 9)], parts[-1])
    parts += spawn(4, train_parts, [(four[2], 9, 11), (four[0], 11, 12)], parts[-1])
    moved = torch.tensor([loss for part in parts for loss in part["curve"]])
    torch.testing.assert_close(moved, torch.tensor(curve), atol=1e-5, rtol=0)
    for name, value in weights.items():
        torch.testing.assert_close(parts[-1]["weights"][name], value, atol=1e-4, rtol=1e-3, msg=name)


def test_same_workers_resume_to_the_bit(spawn: Callable) -> None:
    stages = [config("arplus-weighted", workers=2, zero_stage=stage) for stage in range(4)]
    configs = [*stages, *map(second_stage, stages)]
    for c, ((before, after), whole) in zip(configs, spawn(2, cut_and_whole, configs), strict=True):
        assert before["curve"] + after["curve"] == whole["curve"]
        assert all(norm > 0 for norm in after["norms"])
        for kind in ("weights", "moments", "schedule"):
            assert after[kind].keys() == whole[kind].keys()
            assert all(torch.equal(torch.as_tensor(after[kind][n]), torch.as_tensor(v)) for n, v in whole[kind].items())
        start, only = initial_model(c).weights(), c.optimizer.only
        same = {name for name, value in whole["weights"].items() if torch.equal(value, start[name])}
        assert same == {name for name in start if only and component_of(name) not in only}
        assert len(whole["moments"]) == 2 * len(start.keys() - same)
