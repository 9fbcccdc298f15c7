"""What a sweep varies: the syntax, its errors, and what follows from it."""

import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from arplus import cli
from arplus.config import (
    Dimension,
    TuneConfig,
    flat,
    from_dict,
    parse_space,
    preset,
    tiny,
    to_dict,
    validate,
    with_values,
)
from arplus.config.space import bounds_problem
from arplus.errors import UsageError
from arplus.study.search import Search


def by_name(*items: str) -> dict[str, Dimension]:
    return {dimension.name: dimension for dimension in parse_space(items)}


def sweep(**changes: object) -> TuneConfig:
    return with_values(TuneConfig(run=tiny(preset("arplus"))), changes, source="test")


def test_every_sweep_varies_the_rate_and_lambda_unless_told_otherwise() -> None:
    assert by_name() == {
        "optimizer.lr": Dimension("optimizer.lr", "loguniform", (1.5e-4, 1e-2)),
        "objective.lambda1": Dimension("objective.lambda1", "uniform", (0, 1)),
    }
    other = by_name("objective.lambda1=fixed", "optimizer.lr = loguniform(1e-5, 1e-3)", "model.dropout=uniform(0,0.3)")
    assert list(other) == ["optimizer.lr", "model.dropout"]
    assert other["optimizer.lr"].values == (1e-5, 1e-3)


def test_all_forms_are_read() -> None:
    found = by_name(
        "model.memory-hops=int(0,3)", "batch_size=choice(16,32)", "model.ff_bottleneck=choice(None,32)",
        "model.auxiliary=choice(infilling,lm)", "model.rezero=choice(True,False)",
    )  # fmt: skip
    assert found["model.memory_hops"] == Dimension("model.memory_hops", "int", (0, 3))
    assert found["batch_size"].values == (16, 32)
    assert found["model.ff_bottleneck"].values == (None, 32)
    assert found["model.auxiliary"].values == ("infilling", "lm")
    assert found["model.rezero"].values == (True, False)


@pytest.mark.parametrize(
    ("item", "problem"),
    [
        ("model.dropot=uniform(0,1)", r"unknown key 'model.dropot' \(did you mean 'model.dropout'\?\)"),
        ("model.dropout", "must be NAME=uniform"),
        ("model.dropout=normal(0,1)", "must be NAME=uniform"),
        ("model.dropout=uniform(0.3)", r"needs two numbers, uniform\(LOW,HIGH\)"),
        ("model.dropout=uniform(a,b)", "needs two numbers"),
        ("model.dropout=uniform(0.3,0.1)", "LOW must be below HIGH"),
        ("optimizer.lr=loguniform(0,1)", "LOW must be above 0"),
        ("model.memory_hops=int(0.5,2)", "needs two whole numbers"),
        ("batch_size=choice()", "needs choices"),
        ("batch_size=choice(8,8)", "needs choices that differ"),
        ("run_name=choice(a,b)", "unknown key"),
        ("epochs=int(1,3)", "unknown key"),
        ("optimizer.lr=loguniform(1e-320,1e-3)", "must be 0 or at least 2.23e-308"),
        ("optimizer.lr=loguniform(1e-3,1e-320)", "LOW must be below HIGH"),
        ("optimizer.lr=loguniform(1e-300,1e300)", "HIGH / LOW must be below 1.8e[+]308"),
        ("optimizer.lr=loguniform(1,1.0000000000000002)", "so near that fewer than 1,000"),
        ("optimizer.lr=uniform(0,1e-310)", "must be 0 or at least"),
        ("optimizer.lr=uniform(2.3e-308,2.4e-308)", "the range between them must be 0 or at least"),
        ("optimizer.lr=uniform(0.1,0.10000000000000002)", "so near"),
        ("model.dropout=uniform(-1e308,1e308)", "HIGH - LOW must be below"),
        ("model.dropout=uniform(0,1e999)", "both finite"),
        ("model.dropout=uniform(0,Infinity)", "both finite"),
        ("model.dropout=uniform(NaN,1)", "both finite"),
        (f"model.dropout=uniform(0,1{'0' * 400})", "both finite"),
        ("model.dropout=uniform(9007199254740992,9007199254740993)", "LOW must be below HIGH"),
        ("model.memory_hops=int(1e300,2e300)", "needs two whole numbers"),
        ("model.memory_hops=int(3,3)", "LOW must be below HIGH"),
        (f"batch_size=int(1,1{'0' * 400})", "at most 9,007,199,254,740,992"),
        ("seed=int(0,9223372036854775807)", "at most 9,007,199,254,740,992"),
    ],
)
def test_a_mistake_names_the_flag_and_the_item(item: str, problem: str) -> None:
    with pytest.raises(UsageError, match=rf"^test: --space: .*{problem}"):
        sweep(space=[item])


def test_nothing_to_vary_is_refused() -> None:
    with pytest.raises(UsageError, match="leaves nothing"):
        sweep(space=["optimizer.lr=fixed", "objective.lambda1=fixed"])


def test_values_along_a_range() -> None:
    lr = Dimension("optimizer.lr", "loguniform", (1e-4, 1e-2))
    assert lr.at(0.5) == pytest.approx(1e-3)
    assert (lr.at(0), lr.at(1)) == (1e-4, 1e-2), "to the bit"
    assert lr.grid(3) == [1e-4, pytest.approx(1e-3), 1e-2]
    assert Dimension("model.memory_hops", "int", (1, 3)).grid(5) == [1, 2, 3], "none twice"
    assert Dimension("batch_size", "choice", (8, 16)).grid(5) == [8, 16]
    assert lr.holds(1e-4)
    assert not lr.holds(2e-2)
    assert not lr.holds(math.nan)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [
        ("loguniform", 2.3e-308, 4.0),
        ("loguniform", 1.0, 1.000000000001),
        ("uniform", -8.9e307, 8.9e307),
        ("uniform", 0.1, 0.1 + 1e-12),
        ("int", -(2**53), 2**53),
    ],
)
def test_the_widest_and_the_narrowest_ranges_are_held(kind: Any, low: float, high: float) -> None:
    assert bounds_problem(kind, low, high) is None
    dimension = Dimension("optimizer.weight_decay", kind, (low, high))
    for search in ("random", "grid", "optuna"):
        found = Search(replace(sweep(), search=search, trials=9, grid_points=9), [dimension], {})
        values = [chosen["optimizer.weight_decay"] for n in range(2, 8) if (chosen := found.choose(n))]
        assert len(set(values)) == 6
        assert all(dimension.holds(value) for value in values)


def test_a_grid_that_is_larger_than_the_sweep_is_refused_with_the_sum() -> None:
    with pytest.raises(UsageError, match=r"--trials: the grid has 4 × 4 = 16 points; raise --trials .* \(got 10\)"):
        sweep(search="grid", trials=10)
    assert validate(sweep(search="grid", trials=16)).trials == 16


def test_what_a_study_cannot_have_is_refused() -> None:
    for flag, value in (("max_steps", 5), ("validate_every", 5), ("resume", "s3://bucket/run")):
        with pytest.raises(UsageError, match=f"--{flag.replace('_', '-')}: "):
            sweep(**{flag: value})
    with pytest.raises(UsageError, match=r"--lr-bounds: .*leave one out"):
        sweep(lr_bounds="file", space=["optimizer.lr =uniform(1,2)"])


def command(*arguments: str) -> TuneConfig:
    read = cli.preset_command(arguments, lambda run: TuneConfig(run=run), prog="jobs/tune.py", description="Searches.")
    return read.config


def test_the_command_line_is_that_of_a_run_and_a_few_flags_more(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"preset": "ar", "epochs": 7, "trials": 3}))
    config = command(
        "ar", "--tiny", "--config", str(file), "--trials", "5", "--space", "batch_size=choice(8,16)",
        "--space", "model.dropout=uniform(0,0.3)", "--optimizer.lr", "1e-3",
    )  # fmt: skip
    assert (config.run.preset, config.run.epochs, config.trials, config.run.optimizer.lr) == ("ar", 7, 5, 1e-3)
    assert config.run.model == tiny(preset("ar")).model
    assert config.space == ("batch_size=choice(8,16)", "model.dropout=uniform(0,0.3)")
    with pytest.raises(UsageError, match=r"^--space: model.dropot=uniform\(0,1\): unknown key"):
        command("ar", "--space", "model.dropot=uniform(0,1)")
    with pytest.raises(UsageError, match=r"^unknown flag '--trails'; did you mean --trials\?"):
        command("ar", "--trails", "3")


def test_a_study_contains_the_settings_of_its_runs() -> None:
    config = command("arplus", "--tiny", "--epochs", "9", "--trials", "2")
    assert config.run == replace(tiny(preset("arplus")), epochs=9)
    plain = to_dict(config)
    assert plain == to_dict(config.run) | {name: plain[name] for name in own_names(config)}, (
        "one level, as on the flags"
    )
    assert from_dict(TuneConfig, json.loads(json.dumps(plain)), source="study.json") == config
    assert list(flat(config)) == [*flat(config.run), *own_names(config)]


def own_names(config: TuneConfig) -> list[str]:
    return [field.name for field in fields(config) if field.name != "run"]
