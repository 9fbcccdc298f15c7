"""A study on storage and MLflow that are away for a while: what it has found is not lost."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from arplus import storage
from arplus.config import StudyConfig, TrainConfig, TuneConfig, to_dict, with_values
from arplus.errors import UsageError
from arplus.runs.attempt import SupersededError
from arplus.study.record import OBJECTIVE, Study, StudyFacts, StudyFolder, Trial, resolve_study
from arplus.tracking import RunRef


def begin(config: StudyConfig) -> Study:
    return Study.begin(config, kind="sweep", fingerprint="test")


def test_a_study_waits_for_storage_that_refuses(
    s3_server: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch, refusing: Callable[[], Any]
) -> None:
    monkeypatch.setattr("arplus.tracking.start_run", lambda *_, **__: RunRef("", "", "run"))
    run = TrainConfig(storage=s3_server.uri(tmp_path.name), run_name="s", mlflow="http://127.0.0.1:9")
    config = TuneConfig(run=run)
    with refusing():
        study = begin(config)
    with refusing():
        trial = study.add("trial-0001", {}, run)
    with refusing():
        trial.outcome = "finished"
        study.save(trial)
    with refusing():
        study.folder.write("trials.csv", "table")
    assert storage.read_bytes(f"{study.uri}/trials.csv") == b"table"
    with refusing():
        assert begin(config).trials["trial-0001"].outcome == "finished"


def test_a_run_that_goes_on_takes_what_may_differ_from_the_study(tmp_path: Path) -> None:
    """Two GPUs less, another folder: but never other numbers."""
    folder = str(tmp_path / "old")
    run = TrainConfig(storage=folder, run_name="s", experiment="e", mlflow=f"sqlite:///{tmp_path}/m.db", workers=4)
    began = TuneConfig(run=run)
    study = begin(began)
    run = replace(run, run_name="t", storage=f"{study.uri}/runs", max_steps=7, seed=3, log_every=9)
    trial = study.add("t", {"seed": 3}, run)
    (tmp_path / "old").rename(tmp_path / "new")
    changes = {"storage": str(tmp_path / "new"), "workers": 2, "zero_stage": 1}
    study = begin(with_values(began, changes, source="test"))
    trial = study.trials["t"]
    study.renew(trial)
    today = replace(run, workers=2, zero_stage=1, storage=f"{study.uri}/runs", log_every=began.run.log_every)
    assert trial.config == today


def test_a_study_goes_on_from_the_model_that_its_alias_named_when_it_began(tmp_path: Path) -> None:
    run = TrainConfig(storage=str(tmp_path), run_name="s", data="d", init_from="models:/m@best", mlflow="http://none")
    facts = StudyFacts("sweep", "", "", "", config=to_dict(TuneConfig(run=replace(run, init_from="models:/m/3"))))
    StudyFolder(f"{tmp_path}/s").facts.write(facts)
    assert resolve_study(TuneConfig(run=run), "tune").run.init_from == "models:/m/3", "and MLflow is not asked"


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    record = StudyFolder(str(tmp_path)).trial("t")
    results: list[dict[str, int | float]] = [{"examples": 56, "response_ppl": 3.5, OBJECTIVE: 3.0}]
    trial = Trial(
        name="t", values={"seed": 3}, config=TrainConfig(), outcome="failed", problem="at s3://me:x@h", results=results
    )
    record.write(trial)
    assert record.read() == trial
    assert record.text(record.read()) == record.text(trial), "a whole number stays one"


@pytest.mark.parametrize("changes", [{}, {"seed": 3}])
def test_another_job_that_begins_at_the_same_moment_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """The newer job has the study; but one of other settings does not overwrite what the other has just begun."""
    config = TuneConfig(run=TrainConfig(storage=str(tmp_path), run_name="s", mlflow="http://127.0.0.1:9"))
    others: list[Study] = []

    def start_run(*_: object, **__: object) -> RunRef:
        if not others:  # after this job has looked, and before it writes
            others.append(cast(Any, None))
            others[0] = begin(replace(config, run=replace(config.run, **changes)))
        return RunRef("", "", "run")

    monkeypatch.setattr("arplus.tracking.start_run", start_run)
    if changes:
        with pytest.raises(UsageError, match=r"this study has other settings .*seed: 3 there, 0 here"):
            begin(config)
        others[0].check_owner()
    else:
        begin(config).check_owner()
        with pytest.raises(SupersededError, match="another job has taken this study over"):
            others[0].check_owner()
