"""An evaluation that cannot deliver its metrics is not begun; one whose MLflow or disk fails later loses nothing."""

import json
import logging
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.prepared import CHARACTERS, PERSONA_WORDS
from mlflow import MlflowClient

from arplus import tracking
from arplus.config import EvaluateConfig, ExampleRules, preset
from arplus.errors import ResourceError, UsageError
from arplus.evaluation.delivery import Destination, deliver, destination
from arplus.runs import checkpoint
from arplus.runs.checkpoint import TrainProgress, TrainState

RESULT: dict[str, Any] = {
    "splits": {"test": {"examples": 9, "standard": {"bleu": 1.5}, "paper_compatible": {}, "persona": {"claims": 3.0}}}
}
AWAY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EvaluateConfig:
    """Of a run's only checkpoint, whose MLflow run is in a sqlite file beside it."""
    folder = tmp_path_factory.mktemp("runs")
    trained = replace(preset("arplus"), storage=str(folder), run_name="first")
    run = tracking.start_run(f"sqlite:///{folder}/mlflow.db", "arplus", "first", tags={}, params={})
    state = TrainState(
        config=trained,
        progress=TrainProgress(fingerprint="test", examples=640),
        schedule={},
        rules=ExampleRules(),
        characters=CHARACTERS,
        persona_words=PERSONA_WORDS,
        weights={},
        moments={},
        mlflow_run_id=run.run_id,
    )
    checkpoint.save(str(folder / "first"), state)
    return EvaluateConfig(checkpoint=str(folder / "first"), data="somewhere")


def logged(to: Destination, key: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in MlflowClient(to.mlflow).get_metric_history(to.run_id, key)]


def test_what_cannot_be_delivered_is_refused_before(config: EvaluateConfig, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=f"MLflow at {AWAY} cannot be used"):
        destination(replace(config, mlflow=AWAY))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=f"^{tmp_path}/file/metrics.json: "):
        destination(replace(config, json=f"{tmp_path}/file/metrics.json"))
    with pytest.raises(UsageError, match=f"^{tmp_path}: is a folder; name a file"):
        destination(replace(config, json=str(tmp_path)))
    assert destination(replace(config, json=f"{tmp_path}/file")).examples == 640
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("file", "mine")]


def test_mlflow_has_the_metrics_where_the_file_fails(config: EvaluateConfig, tmp_path: Path) -> None:
    config = replace(config, json=f"{tmp_path}/metrics.json")
    to = destination(config)
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(UsageError, match=f"^{tmp_path}/metrics.json: "):
        deliver(RESULT, config, to)
    assert logged(to, "test/standard/bleu") == [(640, 1.5)]
    (tmp_path / "metrics.json").rmdir()
    deliver(RESULT, config, to)
    assert json.loads((tmp_path / "metrics.json").read_text()) == RESULT
    assert set(logged(to, "test/persona/claims")) == {(640, 3.0)}


@pytest.mark.parametrize("status", ["RUNNING", "FAILED"])
def test_a_second_evaluation_is_seen_and_the_runs_status_stays(config: EvaluateConfig, status: str) -> None:
    to = destination(config)
    client = MlflowClient(to.mlflow)
    client.update_run(to.run_id, status=status)
    for bleu in (2.5, 1.25):  # at another temperature, say
        found = {"splits": {"again": RESULT["splits"]["test"] | {"standard": {"bleu": bleu}}}}
        deliver(found, config, to)
        run = client.get_run(to.run_id)
        assert run.data.metrics["again/standard/bleu"] == bleu
        assert run.info.status == status


def test_a_checkpoint_without_a_run_gets_a_page_that_says_what_it_is(config: EvaluateConfig) -> None:
    to = replace(destination(config), run_id=None, run_name="exported")
    deliver(RESULT, config, to)
    (run,) = MlflowClient(to.mlflow).search_runs(["1"], "attributes.run_name = 'exported'")
    assert run.data.tags["mlflow.note.content"].startswith("Evaluation of a checkpoint of `exported`")
    assert {"command", "mlflow.source.name", "code"} <= run.data.tags.keys()
    assert run.info.status == "FINISHED"


def test_what_mlflow_misses_can_be_replayed(
    config: EvaluateConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its server goes away during the evaluation."""
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # the local record stays where MLflow missed some of it
    close = tracking.Tracker.close
    monkeypatch.setattr(tracking.Tracker, "close", lambda self, status: close(self, status, timeout=0.5))
    config = replace(config, json=f"{tmp_path}/metrics.json")
    to = destination(config)
    later = {"splits": {"later": RESULT["splits"]["test"]}}
    deliver(later, config, replace(to, mlflow=AWAY))
    assert json.loads((tmp_path / "metrics.json").read_text()) == later
    assert f"replay {config.checkpoint}/tracking" in caplog.text
    assert logged(to, "later/standard/bleu") == []
    assert tracking.replay(to.records, to.mlflow) > 0
    assert logged(to, "later/standard/bleu") == [(640, 1.5)]
    with pytest.raises(ResourceError, match="cannot be used"):
        deliver(RESULT, config, replace(to, mlflow=AWAY, run_id=None))
    assert json.loads((tmp_path / "metrics.json").read_text()) == RESULT
