"""A study on storage and MLflow that are away for a while: what it has found is not lost."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from arplus import storage
from arplus.config import StudyConfig, TrainConfig, TuneConfig, with_values
from arplus.errors import RefusedError
from arplus.study.record import Study
from arplus.tracking import RunRef


@pytest.fixture
def refusing(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """S3 refuses the block's first two seconds, as it does when it is asked too often (ray#55055)."""
    name, right = "AWS_SECRET_ACCESS_KEY", s3_server.environment["AWS_SECRET_ACCESS_KEY"]

    @contextmanager
    def block() -> Iterator[None]:
        monkeypatch.setenv(name, "wrong")
        with pytest.raises(RefusedError):
            storage.exists(s3_server.uri("any"))
        again = threading.Timer(2.0, monkeypatch.setenv, (name, right))
        again.start()
        yield
        again.join()

    return block


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
        study.write("trials.csv", "table")
    assert storage.read_bytes(f"{study.uri}/trials.csv") == b"table"
    with refusing():
        assert begin(config).trials["trial-0001"].outcome == "finished"
    assert study.records == f"{study.uri}/tracking"


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
    assert trial.settings == today
