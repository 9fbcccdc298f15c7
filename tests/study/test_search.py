"""What a sweep tries, what ASHA makes of it, and that a sweep that goes on repeats nothing."""

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from arplus.config import (
    Dimension,
    TuneConfig,
    parse_space,
    preset,
    tiny,
    to_dict,
    with_values,
)
from arplus.errors import UsageError
from arplus.study import execute
from arplus.study.record import OBJECTIVE, Trial
from arplus.study.search import Search
from arplus.study.tune import with_budget

CONFIG = TuneConfig(run=tiny(preset("arplus")))
LR = [Dimension("optimizer.lr", "loguniform", (1e-5, 1e-1))]


def ended(values: dict[str, Any], ppl: float, outcome: Any = "finished", examples: int = 800) -> Trial:
    result = {"examples": examples, "response_ppl": ppl, OBJECTIVE: ppl}
    return Trial(name="t", values=values, config={}, outcome=outcome, results=[result])


def bowl(values: dict[str, Any]) -> float:
    """A perplexity that is lowest at 1e-3."""
    return 40 + 10 * math.log10(values["optimizer.lr"] / 1e-3) ** 2


def run(config: TuneConfig, trials: int, known: dict[int, Trial] | None = None) -> dict[int, Trial]:
    """A search without training."""
    known = dict(known or {})
    search = Search(config, LR, known)
    for number in range(len(known) + 1, trials + 1):
        values = search.choose(number)
        assert values is not None
        known[number] = ended(values, bowl(values))
        search.learn(number, known[number])
    return known


@pytest.mark.parametrize("kind", ["optuna", "random"])
def test_the_first_trial_is_the_settings_as_they_are_where_the_space_holds_them(kind: Any) -> None:
    config = replace(CONFIG, search=kind)
    assert Search(config, LR, {}).choose(1) == {"optimizer.lr": 2e-3}
    elsewhere = [Dimension("optimizer.lr", "loguniform", (1e-5, 1e-3))]
    assert Search(config, elsewhere, {}).choose(1) != {"optimizer.lr": 2e-3}


def test_a_grid_has_every_point_once_and_ends() -> None:
    config = replace(CONFIG, search="grid", grid_points=2)
    grid = Search(config, parse_space(["batch_size=choice(16,32)"]), {})
    points = [grid.choose(number) for number in range(1, 9)]
    assert len({str(point) for point in points}) == 8
    assert all(
        point is not None and point.keys() == {"optimizer.lr", "objective.lambda1", "batch_size"} for point in points
    )
    assert grid.choose(9) is None


@pytest.mark.parametrize("kind", ["optuna", "random", "grid"])
def test_a_search_that_goes_on_chooses_what_an_undisturbed_one_would(kind: Any) -> None:
    config = replace(CONFIG, search=kind, trials=12, grid_points=12)
    whole = {n: t.values for n, t in run(config, 12).items()}
    assert {n: t.values for n, t in run(config, 12, run(config, 7)).items()} == whole
    assert len({values["optimizer.lr"] for values in whole.values()}) == 12
    assert kind == "grid" or run(with_values(config, {"seed": 1}, source="test"), 2)[2].values != whole[2]


def test_random_values_depend_on_seed_and_number_alone() -> None:
    config = replace(CONFIG, search="random")
    known = {n: ended({"optimizer.lr": 10.0**-n}, 40.0, "diverged") for n in range(1, 5)}
    assert run(config, 5, known)[5].values == run(config, 5)[5].values


@pytest.mark.parametrize("seed", range(3))
def test_optuna_finds_the_best_rate_and_goes_on_without_repeating_itself(seed: int) -> None:
    config = with_values(CONFIG, {"trials": 16, "seed": seed, "optimizer.lr": 1e-5}, source="test")
    first = run(config, 6)
    whole = run(config, 16, first)
    assert len({t.values["optimizer.lr"] for t in whole.values()}) == 16
    assert min(bowl(t.values) for t in whole.values()) < 40.5, "within a fifth of a decade of the best"


def test_optuna_keeps_away_from_what_diverged_and_knows_what_runs() -> None:
    values = [{"optimizer.lr": rate} for rate in (1e-5, 1e-4, 1e-3, 3e-2, 1e-1)]
    known = {
        n: ended(v, bowl(v), "diverged" if v["optimizer.lr"] > 1e-2 else "finished") for n, v in enumerate(values, 1)
    }
    known[6] = Trial(name="t", values={"optimizer.lr": 2e-3}, config={})
    search = Search(replace(CONFIG, trials=6), LR, known)
    proposed = [search.choose(number) for number in range(7, 19)]
    assert sum(p is not None and p["optimizer.lr"] > 1e-2 for p in proposed) <= 3
    search.learn(6, ended({"optimizer.lr": 2e-3}, 40.0))  # it was unfinished, and is now done


def test_asha_stops_the_worse_after_the_same_examples_and_never_at_the_end() -> None:
    asha = execute.asha(800, 8, 3.0)
    assert asha is not None

    def report(name: str, examples: int, ppl: float) -> str:
        trial: Any = SimpleNamespace(trial_id=name)
        if name not in asha._trial_info:
            asha.on_trial_add(None, trial)  # type: ignore[arg-type]
        return asha.on_trial_result(None, trial, {"examples": examples, OBJECTIVE: ppl})  # type: ignore[arg-type]

    assert [report("a", examples, 50.0) for examples in range(100, 900, 100)] == ["CONTINUE"] * 8
    assert report("b", 96, 60.0) == "STOP", "a short last batch moves no rung"
    assert report("c", 100, 40.0) == "CONTINUE"
    assert report("c", 200, 90.0) == "CONTINUE", "not a rung"
    assert report("c", 300, 90.0) == "STOP"
    assert report("d", 100, 39.0) == "CONTINUE"
    assert report("d", 300, 39.0) == "CONTINUE"
    assert report("d", 800, 99.0) == "CONTINUE", "a run ends by itself"


def test_asha_of_a_sweep_that_goes_on_knows_the_validations_so_far() -> None:
    asha = execute.asha(800, 8, 3.0, [ended({}, 40.0, examples=100)])
    assert asha is not None
    trial: Any = SimpleNamespace(trial_id="new")
    asha.on_trial_add(None, trial)  # type: ignore[arg-type]
    assert asha.on_trial_result(None, trial, {"examples": 100, OBJECTIVE: 41.0}) == "STOP"  # type: ignore[arg-type]


def test_a_trial_that_goes_on_keeps_its_place_on_the_rungs_it_had_reached() -> None:
    """Its next validation is later and better, and would push the others down."""
    asha = execute.asha(800, 8, 3.0, [ended({}, 50.0, examples=100)])
    assert asha is not None
    execute.replay(asha, "again", [{"examples": 100, OBJECTIVE: 49.0}])
    trials: list[Any] = [SimpleNamespace(trial_id=name) for name in ("again", "new")]
    for trial, examples, ppl in zip(trials, (200, 100), (44.0, 48.5), strict=True):
        asha.on_trial_add(None, trial)  # type: ignore[arg-type]
        assert asha.on_trial_result(None, trial, {"examples": examples, OBJECTIVE: ppl}) == "CONTINUE"  # type: ignore[arg-type]


def test_one_validation_leaves_nothing_to_stop() -> None:
    assert execute.asha(800, 1, 3.0) is None


@pytest.mark.parametrize(("batch_size", "budget"), [(8, 200), (32, 200), (8, 83), (8, 40), (7, 83 * 3)])
def test_a_budget_is_examples_whatever_the_batch_size(batch_size: int, budget: int) -> None:
    run = with_budget(replace(CONFIG.run, batch_size=batch_size), budget, 4, 83)
    assert run.max_steps is not None
    epochs, left = divmod(run.max_steps, -(-83 // batch_size))
    seen = epochs * 83 + min(left * batch_size, 83)
    assert budget <= seen < budget + batch_size
    assert run.epochs == -(-budget // 83)
    assert run.validate_every is not None
    assert 2 < run.max_steps / run.validate_every <= 4


def test_values_go_to_their_places_and_wrong_ones_name_the_source() -> None:
    run = with_values(CONFIG.run, {"optimizer.lr": 0.5, "batch_size": 4}, source="here")
    assert to_dict(run) == to_dict(replace(CONFIG.run, batch_size=4, optimizer=replace(CONFIG.run.optimizer, lr=0.5)))
    with pytest.raises(UsageError, match=r"^here: --model.heads: must divide"):
        with_values(run, {"model.heads": 5}, source="here")
