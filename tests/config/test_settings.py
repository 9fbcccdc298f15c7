"""Settings: their way to JSON and back, their roles, and what is said of each."""

import ast
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Gt
from hypothesis import given, settings
from hypothesis import strategies as st

from arplus import config as config_module
from arplus.config import (
    INLINE,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Role,
    TrainConfig,
    TuneConfig,
    dotted_names,
    flag,
    flat,
    from_dict,
    names_of_role,
    preset,
    to_dict,
)

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
        "batch_size",
        "seed",
        "precision",
        "init_from",
        "feed.shuffle_window_batches",
        "feed.max_examples",
        "init.pretrained",
        "init.parts",
        "init.layers",
        "init.digest",
        "init.character_vectors",
    ]
    assert names_of_role(TrainConfig, Role.LABEL) == ["experiment", "preset"]
    assert names_of_role(TrainConfig, Role.BUDGET) == ["epochs", "max_steps", "validate_every", "patience"]
    own = [name for name in names_of_role(TuneConfig, Role.OPERATION) if name not in dotted_names(TrainConfig)]
    assert own == ["concurrency", "trials"]


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
