"""A study on storage and MLflow that are away for a while: what it has found is not lost."""

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest

from arplus import storage
from arplus.config import StudyConfig, TuneConfig
from arplus.errors import RefusedError
from arplus.study.record import Study
from arplus.tracking import Run


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
    monkeypatch.setattr("arplus.tracking.start_run", lambda *_, **__: Run("", "", "run"))
    config = TuneConfig(storage=s3_server.uri(tmp_path.name), run_name="s", mlflow="http://127.0.0.1:9")
    with refusing():
        study = begin(config)
    with refusing():
        trial = study.add("trial-0001", {}, config)
    with refusing():
        trial.outcome = "finished"
        study.save(trial)
    with refusing():
        study.write("trials.csv", "table")
    assert storage.read_bytes(f"{study.uri}/trials.csv") == b"table"
    with refusing():
        assert begin(config).trials["trial-0001"].outcome == "finished"
    assert study.records == f"{study.uri}/tracking"
