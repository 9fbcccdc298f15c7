"""Settings: their defaults, their checks, and their way to JSON and back."""

import ast
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import pytest
from annotated_types import Gt
from hypothesis import given, settings
from hypothesis import strategies as st

from arplus import config as config_module
from arplus.config import (
    INLINE,
    PAPER_ROWS,
    PRESETS,
    ChatConfig,
    EvaluateConfig,
    ExampleRules,
    LrFindConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    PlacementConfig,
    PrepareConfig,
    Role,
    Sampling,
    SynthesizeConfig,
    TrainConfig,
    TuneConfig,
    VocabularySizes,
    dotted_names,
    flag,
    flat,
    from_dict,
    names_of_role,
    preset,
    special_ids,
    tiny,
    to_dict,
    validate,
)
from arplus.config.gpus import peak_flops
from arplus.errors import UsageError

ROWS = ["ar", "arplus", "no-rezero", "no-albert", "no-factor-ff", "no-memn2n", "no-bart-mlm"]

# What each row has that AR+ has not: one method less, or for AR all five.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "arplus": {},
    "no-rezero": {"rezero": False},
    "no-albert": {"repeats": 1, "embedding_size": 512},
    "no-factor-ff": {"ff_bottleneck": None},
    "no-memn2n": {"memory_hops": 0},
    "no-bart-mlm": {"auxiliary": "lm"},
    "ar": {
        "rezero": False,
        "repeats": 1,
        "embedding_size": 512,
        "ff_bottleneck": None,
        "memory_hops": 0,
        "auxiliary": "lm",
        "tied_head": True,
        "decoder_norm": False,
    },
}

LEARNING_RATES = {
    "ar": 1.5e-4,
    "arplus": 2e-3,
    "no-rezero": 1.5e-4,
    "no-albert": 2e-3,
    "no-factor-ff": 1.5e-4,
    "no-memn2n": 1.5e-4,
    "no-bart-mlm": 1.5e-4,
}


def message_of(cls: type, values: dict[str, Any]) -> str:
    with pytest.raises(UsageError) as caught:
        from_dict(cls, values, source="settings.json")
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------- paper's values


def test_the_presets_are_the_papers_seven_rows() -> None:
    assert list(PAPER_ROWS) == ROWS
    assert list(PRESETS) == [*ROWS, "arplus-large", "ar-weighted", "arplus-weighted"]
    assert all(row.preset == name for name, row in PRESETS.items())


def test_ar_plus_has_the_papers_sizes() -> None:
    assert asdict(preset("arplus").model) == {
        "layers": 6,
        "repeats": 6,
        "d_model": 512,
        "embedding_size": 200,
        "heads": 8,
        "ff_size": 2048,
        "ff_bottleneck": 100,
        "activation": "relu",
        "rezero": True,
        "gate_start": 0.0,
        "shared_stacks": True,
        "fixed_attention": 0.1,
        "memory_hops": 3,
        "memory_tying": "adjacent",
        "auxiliary": "infilling",
        "tied_head": False,
        "decoder_norm": True,
        "adapter": None,
        "dropout": 0.1,
        "features": {
            "path": None,
            "use": "replace",
            "layers": "-2",
            "combine": "mean",
            "width": None,
            "digest": None,
        },
        "persona_weight": "one",
    }
    assert VocabularySizes() == VocabularySizes(characters=9_498, persona_words=10_011)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_ar_plus_in_its_methods_alone(name: str) -> None:
    ours, full = asdict(preset(name).model), asdict(preset("arplus").model)
    assert {key: value for key, value in ours.items() if value != full[key]} == DIFFERENCES[name]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_as_the_papers_code_did(name: str) -> None:
    row = preset(name)
    assert asdict(row.optimizer) == {
        "lr": LEARNING_RATES[name],
        "eps": 1e-8 if name == "ar" else 1e-6,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "schedule": "plateau",
        "warmup": 0,
        "plateau_factor": 0.5,
        "plateau_patience": 60,
        "min_lr": 1.5e-4,
        "only": (),
    }
    assert (row.batch_size, row.epochs) == (64, 3)
    assert (row.objective.lambda0, row.objective.lambda1) == (1, 0.5)


def test_sampling_is_the_papers() -> None:
    assert asdict(Sampling()) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "max_characters": None,
        "min_characters": 1,
    }
    assert Sampling().of(ExampleRules()).max_characters == 15


def test_the_shortest_reply_is_no_longer_than_the_longest() -> None:
    with pytest.raises(UsageError, match=r"--sampling.min-characters: must be at most max_characters = 5 \(got 6\)"):
        validate(ChatConfig(checkpoint="c", sampling=Sampling(min_characters=6, max_characters=5)))


def test_the_largest_vocabularies_prepared_are_the_papers() -> None:
    prepare, sizes = PrepareConfig(), VocabularySizes()
    assert prepare.max_characters + 9 == sizes.characters
    assert prepare.max_persona_words + 9 == sizes.persona_words


def test_special_tokens_take_the_last_nine_ids() -> None:
    assert special_ids(20) == tuple(range(11, 20))
    assert special_ids(20)._fields == ("pad", "bos", "eos", "unk", "sep", "spe1", "spe2", "mask", "cls")
    assert [token.strip("[]").lower() for token in config_module.SPECIAL_TOKENS] == list(special_ids(20)._fields)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_its_own_checks_and_shrinks_to_the_same_row(name: str) -> None:
    row = preset(name)
    assert validate(row) == row
    small = tiny(row)
    assert validate(small) == small
    assert small.preset == name
    # What makes the row the row stays, in the terms of the small network.
    kept = ("rezero", "auxiliary", "tied_head", "decoder_norm", "dropout", "fixed_attention")
    assert {k: getattr(small.model, k) for k in kept} == {k: getattr(row.model, k) for k in kept}
    assert small.model.memory_hops == min(row.model.memory_hops, 1)
    assert (small.model.ff_bottleneck is None) == (row.model.ff_bottleneck is None)
    assert (small.model.embedding_size == small.model.d_model) == (row.model.embedding_size == row.model.d_model)
    assert (small.model.unique_layers == 1) == (row.model.unique_layers == 1)
    assert (small.model.repeats == 1) == (row.model.repeats == 1)
    assert small.model.d_model < row.model.d_model


def test_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'gpt'.*ar, arplus, no-rezero"):
        preset("gpt")


# ------------------------------------------------------------------------------------------------------ dictionaries

positive = st.floats(min_value=1e-300, allow_nan=False, allow_infinity=False)

train_configs = st.builds(
    lambda shape, shares, optimizer, texts, whole, model: TrainConfig(
        model=ModelConfig(layers=shape[0] * shape[1], repeats=shape[1], d_model=8 * shape[2], heads=shape[3], **model),
        optimizer=optimizer,
        objective=ObjectiveConfig(lambda1=whole["lambda1"]),
        workers=shares[0] if whole["zero_stage"] else f"1:{shares[0]}",
        gradient_accumulation_steps=shares[1],
        batch_size=shares[0] * shares[1] * shares[2],
        max_steps=whole["max_steps"],
        seed=whole["seed"],
        cpus_per_worker=whole["cpus_per_worker"],
        zero_stage=whole["zero_stage"],
        precision=whole["precision"],
        **texts,
    ),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 64), st.sampled_from([1, 2, 4, 8])),
    shares=st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 99)),
    optimizer=st.builds(
        OptimizerConfig,
        lr=positive,
        plateau_patience=st.integers(0),
        only=st.sampled_from([(), ("adapters", "memory")]),
    ),
    texts=st.fixed_dictionaries(
        {name: st.text(st.characters(codec="utf-8")) for name in ("data", "storage", "run_name", "experiment")}
    ),
    whole=st.fixed_dictionaries(
        {
            "lambda1": st.just(0.0) | positive,
            "max_steps": st.none() | st.integers(1),
            "seed": st.integers(0, 2**63 - 1),
            "cpus_per_worker": st.none() | st.floats(0.2, 1e3),
            "zero_stage": st.integers(0, 3),
            "precision": st.sampled_from(["auto", "fp32", "bf16"]),
        }
    ),
    model=st.fixed_dictionaries(
        {
            "ff_bottleneck": st.none() | st.integers(1),
            "rezero": st.booleans(),
            "auxiliary": st.sampled_from(["infilling", "lm"]),
            "dropout": st.floats(0, 1, exclude_max=True),
            "persona_weight": st.sampled_from(["one", "predicted"]),
        }
    ),
)


@settings(deadline=None)  # the first call builds the validator
@given(train_configs)
def test_a_configuration_survives_json(config: TrainConfig) -> None:
    text = json.dumps(to_dict(config), ensure_ascii=False, allow_nan=False)
    assert from_dict(TrainConfig, json.loads(text), source="file") == config


def test_missing_keys_take_their_defaults() -> None:
    assert from_dict(TrainConfig, {}, source="file") == TrainConfig()
    config = from_dict(TrainConfig, {"optimizer": {"lr": 1}, "model": {}}, source="file")
    assert config == TrainConfig(optimizer=OptimizerConfig(lr=1.0))


def test_flat_names_every_setting_once() -> None:
    values = flat(preset("ar"))
    assert list(values) == list(dotted_names(TrainConfig))
    assert (values["optimizer.lr"], values["model.tied_head"], values["preset"]) == (1.5e-4, True, "ar")
    assert flag("model.ff_bottleneck") == "model.ff-bottleneck"


# ------------------------------------------------------------------------------------------------------------ errors


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


# ------------------------------------------------------------------------------------------------------------- roles


@dataclass(frozen=True)
class Part:
    new: int = 1
    saved: Annotated[bool, Role.OPERATION] = True


@dataclass(frozen=True)
class Whole:
    name: Annotated[str, Role.LABEL] = ""
    steps: Annotated[int | None, Gt(0), Role.BUDGET] = None
    part: Annotated[Part, INLINE] = Part()
    guess: Annotated[Part, Role.OPERATION] = Part()


def test_a_setting_is_identity_unless_its_field_or_its_section_says_otherwise() -> None:
    assert names_of_role(Whole, Role.IDENTITY) == ["new"]
    assert names_of_role(Whole, Role.OPERATION) == ["saved", "guess.new", "guess.saved"]
    assert names_of_role(Whole, Role.LABEL, Role.BUDGET) == ["name", "steps"]


def test_what_makes_a_training_run_the_run_it_is() -> None:
    """A setting that is new joins it, unless its field says that a run, or a study, may go on with another value."""
    sections = ("model.", "objective.", "optimizer.")
    identity = [name for name in names_of_role(TrainConfig, Role.IDENTITY) if not name.startswith(sections)]
    assert identity == [
        "precision",
        "batch_size",
        "seed",
        "init_from",
        "init.pretrained",
        "init.parts",
        "init.layers",
        "init.digest",
        "init.character_vectors",
        "feed.shuffle_window_batches",
        "feed.max_examples",
    ]
    assert names_of_role(TrainConfig, Role.LABEL) == ["preset", "experiment"]
    assert names_of_role(TrainConfig, Role.BUDGET) == ["epochs", "max_steps", "validate_every", "patience"]
    own = [name for name in names_of_role(TuneConfig, Role.OPERATION) if name not in dotted_names(TrainConfig)]
    assert own == ["concurrency", "trials"]


# -------------------------------------------------------------------------------------------------------------- GPUs


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 65),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(device: str, tflops: float | None) -> None:
    assert peak_flops(device) == (tflops and tflops * 1e12)


# ------------------------------------------------------------------------------------------------------ documentation


def dataclass_bodies() -> list[ast.ClassDef]:
    """The classes of settings: dataclasses whose fields are named where they are set."""
    trees = [ast.parse(file.read_text()) for file in Path(config_module.__path__[0]).glob("*.py")]
    classes = [node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)]
    return [node for node in classes if any("kw_only" in ast.unparse(d) for d in node.decorator_list)]


def test_every_setting_is_followed_by_its_docstring_and_has_one_default() -> None:
    classes = dataclass_bodies()
    assert {"TrainConfig", "ModelConfig", "PrepareConfig", "Sampling"} <= {c.name for c in classes}
    for c in classes:
        assert ast.get_docstring(c), f"{c.name} has no docstring"
        for field, after in zip(c.body, [*c.body[1:], None], strict=True):
            if isinstance(field, ast.AnnAssign):
                name = f"{c.name}.{ast.unparse(field.target)}"
                assert field.value is not None, f"{name} has no default"
                assert isinstance(after, ast.Expr), f"{name} has no docstring"
                assert isinstance(after.value, ast.Constant), f"{name} has no docstring"
                assert isinstance(after.value.value, str), f"{name} has no docstring"
                assert len(after.value.value) > 5, name
