"""Wrong settings are named by their flags, with what is wrong and what was given."""

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from arplus.config import (
    EvaluateConfig,
    LrFindConfig,
    ModelConfig,
    PlacementConfig,
    PrepareConfig,
    SynthesizeConfig,
    TrainConfig,
    TuneConfig,
    dotted_names,
    flag,
    from_dict,
    preset,
    validate,
)
from arplus.errors import UsageError


def message_of(cls: type, values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        from_dict(cls, values, source="settings.json")
    return str(caught.value)


@pytest.mark.parametrize(
    ("values", "key", "near"),
    [
        ({"optimiser": {"lr": 1}}, "optimiser.lr", "optimizer.lr"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr", "optimizer.lr"),
        ({"batchsize": 1}, "batchsize", "batch_size"),
        ({"feed": 3}, "feed", "seed"),
        ({"model": {"head": {"x": 1}}}, "model.head.x", "model.heads"),
    ],
)
def test_an_unknown_key_lists_the_valid_ones_nearest_first(values: dict[str, Any], key: str, near: str) -> None:
    message = message_of(TrainConfig, values)
    assert message.startswith(f"settings.json: unknown key {key!r} (did you mean {near!r}?)")
    assert message.endswith("valid keys: " + ", ".join(dotted_names(TrainConfig)))


@pytest.mark.parametrize(
    ("values", "start"),
    [
        ({"batch_size": 0}, "--batch-size: must be greater than 0"),
        ({"optimizer": {"lr": "fast"}}, "--optimizer.lr: "),
        ({"optimizer": {"lr": math.nan}}, "--optimizer.lr: "),
        ({"optimizer": {"lr": math.inf}}, "--optimizer.lr: must be finite"),
        ({"optimizer": {"warmup": 9}}, "--optimizer.warmup: is the linear schedule's: add --optimizer.schedule linear"),
        ({"optimizer": {"plateau_factor": 1}}, "--optimizer.plateau-factor: must be less than 1"),
        ({"precision": "fp16"}, "--precision: "),
        ({"zero_stage": 4}, "--zero-stage: must be 'auto', 0, 1, 2 or 3"),
        ({"seed": -1}, "--seed: "),
        ({"seed": 2**63}, "--seed: "),
        ({"max_steps": 0}, "--max-steps: "),  # a union with None, whose error pydantic places below the field
        ({"max_steps": "many"}, "--max-steps: "),
        ({"cpus_per_worker": math.inf}, "--cpus-per-worker: must be finite"),
        ({"cpus_per_worker": 0.1}, "--cpus-per-worker: must be greater than or equal to 0.2"),
        ({"gpus_per_worker": 0}, "--gpus-per-worker: must be greater than or equal to 0.05"),
        ({"gpus_per_worker": 2}, "--gpus-per-worker: must be less than or equal to 1"),
        ({"device": "cuda"}, "--device: must be 'auto', 'gpu' or 'cpu'"),
        ({"epochs": 1.5}, "--epochs: "),
        ({"epochs": None}, "--epochs: "),
        ({"model": {"dropout": 1.0}}, "--model.dropout: must be less than 1"),
        ({"model": {"auxiliary": "none"}}, "--model.auxiliary: "),
    ],
)
def test_a_bad_value_names_its_flag_the_source_and_itself(values: dict[str, Any], start: str) -> None:
    message = message_of(TrainConfig, values)
    assert message.startswith(f"settings.json: {start}")
    bad: Any = values
    while isinstance(bad, dict):
        (bad,) = bad.values()
    assert f"(got {bad!r})" in message


def test_a_section_in_a_settings_place_is_a_bad_value() -> None:
    problem = "--seed: must be a valid integer (got {'x': 1})"
    assert message_of(TrainConfig, {"seed": {"x": 1}}) == f"settings.json: {problem}"


def test_a_run_without_a_loss_is_refused() -> None:
    message = message_of(TrainConfig, {"objective": {"lambda0": 0, "lambda1": 0}})
    assert message.startswith("settings.json: --objective.lambda0: and lambda1 must not both be 0")


def test_all_bad_values_are_named_at_once() -> None:
    message = message_of(TrainConfig, {"batch_size": 0, "model": {"heads": -1}})
    assert re.findall(r"--[\w.-]+", message) == ["--batch-size", "--model.heads"]


@pytest.mark.parametrize(("workers", "accumulation", "least"), [(4, 1, 4), ("1:4", 1, 4), (2, 3, 6), ("2:3", 2, 6)])
def test_a_batch_has_an_example_for_every_micro_batch(workers: int | str, accumulation: int, least: int) -> None:
    values = {"batch_size": least - 1, "workers": workers, "gradient_accumulation_steps": accumulation}
    product = f"{least // accumulation} × {accumulation} = {least}"
    problem = f"--batch-size: must be at least workers × gradient_accumulation_steps = {product}"
    assert message_of(TrainConfig, values).startswith(f"settings.json: {problem}")
    config = from_dict(TrainConfig, values | {"batch_size": least}, source="file")
    assert config.micro_batch_size(least // accumulation) == 1


def test_micro_batches_are_filled_up_to_equal_size() -> None:
    assert [TrainConfig(batch_size=64).micro_batch_size(workers) for workers in (1, 2, 3, 5)] == [64, 32, 22, 13]
    assert TrainConfig(batch_size=64, gradient_accumulation_steps=3).micro_batch_size(2) == 11


def test_a_range_test_has_one_number_of_workers() -> None:
    with pytest.raises(UsageError, match="--workers: must be one number for a range test"):
        validate(LrFindConfig(run=replace(preset("ar"), workers="1:2")))


@pytest.mark.parametrize(("workers", "sizes"), [(3, [3]), ("1:4", [1, 2, 3, 4]), ("2:2", [2])])
def test_workers_are_a_number_or_a_range(workers: int | str, sizes: list[int]) -> None:
    assert list(from_dict(TrainConfig, {"workers": workers}, source="file").world_sizes) == sizes


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "1:101", "a:b", "1:2:3", ""])
def test_other_steps_are_not_profiled(steps: str) -> None:
    problem = "--profile-steps: must be A:B, the first and the last step, counted from 1, and at most 100 in all"
    assert message_of(TrainConfig, {"profile_steps": steps}).startswith(f"settings.json: {problem}")


@pytest.mark.parametrize("workers", [0, -2, "4:1", "0:2", "2", "1:", ":2", "1:2:3", "1.5", "all"])
def test_other_workers_are_refused(workers: int | str) -> None:
    problem = f"--workers: must be a number N or a range MIN:MAX, at least 1 (got {workers!r})"
    assert message_of(TrainConfig, {"workers": workers}) == f"settings.json: {problem}"


@pytest.mark.parametrize(
    ("cls", "values", "problem"),
    [
        (TrainConfig, {"model": {"layers": 6, "repeats": 4}}, "--model.repeats: must divide layers = 6 (got 4)"),
        (TrainConfig, {"model": {"heads": 7}}, "--model.heads: must divide d_model = 512 (got 7)"),
        (TrainConfig, {"model": {"tied_head": True}}, "--model.embedding-size: must equal d_model = 512"),
        (TrainConfig, {"model": {"activation": "gelu"}}, "--model.activation: is the plain feed-forward layer's"),
        (TrainConfig, {"model": {"rezero": False, "gate_start": 1.0}}, "--model.gate-start: is the gate's of ReZero"),
        (
            TrainConfig,
            {"model": {"memory_hops": 0, "memory_tying": "layer-wise"}},
            "--model.memory-tying: is the MemN2N",
        ),
        (TrainConfig, {"compile": "on", "zero_stage": 3}, "--compile: on needs --zero-stage 0, 1 or 2"),
        (TrainConfig, {"compile": "on", "device": "cpu"}, "--compile: on needs GPUs, and --device cpu takes none"),
        (TrainConfig, {"accelerator_type": "L4", "device": "cpu"}, "--accelerator-type: needs GPUs, and --device cpu"),
        (TrainConfig, {"label_selector": ["zone"]}, "--label-selector: must be KEY=VALUE"),
        (TrainConfig, {"label_selector": ["zone="]}, "--label-selector: must be KEY=VALUE"),
        (TrainConfig, {"label_selector": ["zone=in(a,!b)"]}, "--label-selector: must be KEY=VALUE"),
        (TrainConfig, {"label_selector": ["zone=a", "zone=b"]}, "--label-selector: names a key twice"),
        (TrainConfig, {"label_selector": ["a=b"], "workers": "1:2"}, "--label-selector: cannot be had with --workers"),
        (
            TuneConfig,
            {"gpus_per_worker": 0.25, "workers": 2, "device": "gpu"},
            "--gpus-per-worker: lets Ray put several workers of one run on one GPU, and NCCL refuses two ranks on one",
        ),
        (TuneConfig, {"patience": 2}, "--patience: cannot be set for a study: its runs have one budget"),
        (PrepareConfig, {"output": "o"}, "--input: is required"),
        (PrepareConfig, {"input": "i"}, "--output: is required"),
        (PrepareConfig, {"input": "i", "output": "o", "test": 1.5}, "--test: must be a share below 1 or a whole"),
        (PrepareConfig, {"input": "i", "output": "o", "valid": math.inf}, "--valid: must be finite"),
        (SynthesizeConfig, {}, "--output: is required"),
        (SynthesizeConfig, {"output": "o", "records": 9, "broken": 10}, "--records: counts all lines"),
        (SynthesizeConfig, {"output": "o", "records": 9, "broken": 8, "duplicates": 1}, "--duplicates: leave no"),
        (EvaluateConfig, {"data": "d"}, "--checkpoint: is required"),
        (EvaluateConfig, {"checkpoint": "c"}, "--data: is required"),
        (
            EvaluateConfig,
            {"checkpoint": "c", "data": "d", "accelerator_type": "L4", "device": "cpu"},
            "--accelerator-type: needs GPUs, and --device cpu",
        ),
        (
            EvaluateConfig,
            {"checkpoint": "c", "data": "d", "accelerator_type": "l4"},
            "--accelerator-type: is not one of Ray's names of accelerators (got 'l4'; did you mean 'L4'?)",
        ),
    ],
)
def test_settings_that_are_wrong_together_name_the_flag(cls: type, values: dict[str, Any], problem: str) -> None:
    assert message_of(cls, values).startswith(f"settings.json: {problem}")


@pytest.mark.parametrize(("share", "runs"), [(1, 1), (0.6, 1), (0.5, 2), (0.3, 3), (0.3333, 3), (0.2, 5), (0.05, 20)])
def test_runs_that_share_a_gpu(share: float, runs: int) -> None:
    assert PlacementConfig(gpus_per_worker=share).runs_per_gpu == runs
    from_dict(TrainConfig, {"gpus_per_worker": share, "workers": 2}, source="test")  # on CPUs it changes nothing
    if runs == 1:  # each worker has a GPU for itself
        from_dict(TrainConfig, {"gpus_per_worker": share, "workers": 2, "device": "gpu"}, source="test")


def test_shares_and_whole_numbers_of_sessions_are_both_right() -> None:
    for number in (0, 0.25, 1, 20_000.0):
        validate(PrepareConfig(input="i", output="o", valid=number, test=number))


def test_rules_are_bounded() -> None:
    for name in ("max_utterance_characters", "max_context_utterances"):
        for value in (0, 10**6 + 1, 10**19):  # no array can count the last
            with pytest.raises(UsageError, match=flag(name)):
                from_dict(PrepareConfig, {"input": "a", "output": "b", name: value}, source="x")


def test_a_changed_preset_is_checked_too() -> None:
    with pytest.raises(UsageError, match=r"^--model\.repeats: "):
        validate(replace(preset("arplus"), model=ModelConfig(layers=6, repeats=5)))
