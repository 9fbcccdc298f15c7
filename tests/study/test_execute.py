"""What a study leaves of a run that has ended, while others go on."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from helpers.checkpoints import final_metrics, state
from ray.exceptions import ActorDiedError
from ray.tune.search import Searcher

from arplus.config import EvaluateConfig, ObjectiveConfig, TrainConfig, TuneConfig
from arplus.errors import UsageError
from arplus.runs import checkpoint
from arplus.runs.attempt import SupersededError
from arplus.study import execute, verdict
from arplus.study.record import OBJECTIVE, Study, StudyFacts, StudyFolder
from arplus.tracking import RunRef


def study(folder: Path, **settings: Any) -> Study:
    run = TrainConfig(storage=str(folder), run_name="s", **settings)
    facts = StudyFacts(kind="sweep", fingerprint="", mlflow_run_id="", owner="me", config={})
    found = StudyFolder(str(folder / "s"))
    found.facts.write(facts)
    return Study(folder=found, facts=facts, config=TuneConfig(run=run), tracked=RunRef("", "", ""), trials={})


def end(mine: Study, ppls: dict[str, float], outcome: str) -> None:
    """Trials of two checkpoints each, the first of them the best, that end one after the other."""
    source: Any = SimpleNamespace(tell=lambda trial: None, progress=lambda: "")
    adapter = execute._Adapter(mine, source, cast(Any, None), [], None)
    for name, ppl in ppls.items():
        trial = mine.add(name, {}, mine.config.run)
        trial.mlflow_run_id = "m"
        run = mine.folder.run(name)
        uris = [checkpoint.save(run.uri, state(step)) for step in (10, 20)]
        checkpoint.mark_best(run.uri, uris[0], ppl)
        run.final.write(final_metrics(best_response_ppl=ppl))
        adapter.live[name] = trial
        result = {"examples": 9, "response_ppl": ppl, OBJECTIVE: ppl, "outcome": outcome}
        adapter.on_trial_complete(name, result)


def test_an_error_of_a_record_ends_the_study_and_is_not_tunes(tmp_path: Path) -> None:
    """Tune would start a run again whose end cannot be written, and take it back from who took the study over."""
    mine = study(tmp_path)
    adapter = execute._Adapter(mine, cast(Any, SimpleNamespace(progress=lambda: "")), cast(Any, None), [], None)
    adapter.live = {name: mine.add(name, {}, mine.config.run) for name in ("a", "b")}
    mine.folder.facts.write(replace(mine.facts, owner="another"))
    adapter.on_trial_result("a", {"examples": 9, "response_ppl": 1.0, OBJECTIVE: 1.0})
    adapter.on_trial_complete("a", None, error=True)
    adapter.on_trial_complete("b", None, error=True)
    assert isinstance(adapter.error, SupersededError)
    assert not adapter.live
    assert adapter.suggest("c") == Searcher.FINISHED


def test_a_run_that_cannot_be_made_ends_the_study(tmp_path: Path) -> None:
    """Where Ray Tune would raise the error as its own, in its own words, and leave the others running."""

    def draw() -> None:
        raise UsageError("--space: trial-0001: heads")

    adapter = execute._Adapter(study(tmp_path), cast(Any, SimpleNamespace(next=draw)), cast(Any, None), [], None)
    assert adapter.suggest("a") == Searcher.FINISHED
    assert isinstance(adapter.error, UsageError)
    assert adapter.stopping


def test_a_study_that_ended_for_its_failures_says_so_though_a_run_then_ends_well(tmp_path: Path) -> None:
    """Ray Tune asks for no further run once it was told that there is none."""
    mine = study(tmp_path)
    source: Any = SimpleNamespace(next=lambda: None, tell=lambda trial: None, progress=lambda: "")
    adapter = execute._Adapter(mine, source, cast(Any, None), [], None)
    adapter.live = {name: mine.add(name, {}, mine.config.run) for name in ("a", "b", "c", "well")}
    for trial in mine.trials.values():
        trial.mlflow_run_id = "m"
    for name in ("a", "b", "c"):
        adapter.on_trial_complete(name, None, error=True)
    assert adapter.suggest("d") == Searcher.FINISHED
    mine.folder.run("well").final.write(final_metrics(best_response_ppl=1.0))
    adapter.on_trial_complete("well", {"examples": 9, "response_ppl": 1.0, OBJECTIVE: 1.0, "outcome": "finished"})
    assert adapter.error is None
    assert len(adapter.failures) == execute.IN_A_ROW


def left(mine: Study) -> dict[str, tuple[int, bool]]:
    """Of each trial the number of its checkpoints, and whether one has an optimizer's state."""
    found = {}
    for name in mine.trials:
        uris = mine.folder.run(name).checkpoints.list_complete()
        found[name] = len(uris), any(checkpoint.load(uri, moments=True).moments for uri in uris)
    return found


def test_the_best_run_so_far_keeps_all_and_the_one_before_it_its_weights(tmp_path: Path) -> None:
    mine = study(tmp_path)
    end(mine, {"a": 50.0, "b": 40.0, "c": 45.0}, "finished")
    assert [trial.kept for trial in mine.trials.values()] == ["best", "all", "best"]
    assert left(mine) == {"a": (1, False), "b": (2, True), "c": (2, True)}, "c's own process does it"
    assert mine.folder.trial("c").read().kept == "best", "which reads that here"
    mine.drop_checkpoints()
    assert left(mine) == {"a": (0, False), "b": (2, True), "c": (0, False)}
    assert mine.folder.run("a").final.read().best_response_ppl == 50.0
    assert mine.folder.trial("a").read().kept == "none"


@pytest.mark.parametrize("outcome", ["failed", "running"])
def test_a_run_that_may_go_on_keeps_all_that_it_needs(tmp_path: Path, outcome: str) -> None:
    mine = study(tmp_path)
    end(mine, {"a": 40.0}, "finished")
    if outcome == "failed":
        end(mine, {"b": 50.0}, outcome)
    else:
        checkpoint.save(mine.folder.run("b").uri, state(10))
        mine.add("b", {}, mine.config.run)
    there = left(mine)
    mine.drop_checkpoints()
    assert left(mine) == there
    assert there["b"][1]
    assert mine.folder.trial("b").read().kept == "all"


def test_everything_stays_where_that_is_asked_for(tmp_path: Path) -> None:
    mine = study(tmp_path, keep_checkpoints="all")
    end(mine, {"a": 50.0, "b": 40.0}, "finished")
    mine.drop_checkpoints()
    assert left(mine) == {"a": (2, True), "b": (2, True)}
    assert mine.trials["a"].kept == "all"


@pytest.mark.parametrize("lambda0", [1.0, 0.0])
def test_a_sweep_is_not_lost_for_its_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lambda0: float) -> None:
    """Whose evaluation loses a worker, or would be of a response that was not trained."""
    mine = study(tmp_path, objective=ObjectiveConfig(lambda0=lambda0))
    end(mine, {"a": 50.0, "b": 40.0}, "finished")
    asked = []

    def evaluate(config: EvaluateConfig) -> None:
        asked.append(config)
        raise ActorDiedError

    monkeypatch.setattr(verdict, "evaluate", evaluate)
    assert verdict.judge(mine) is None
    assert [config.against for config in asked] == [mine.folder.run("a").uri] * bool(lambda0)
