"""Hooks by themselves, with the real tracker and no server."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from arplus import storage
from arplus.config import TrainConfig
from arplus.data.loader import Step
from arplus.runs.attempt import Attempt, StoppedError
from arplus.runs.checkpoint import TrainProgress
from arplus.tracking import RunRef, Tracker
from arplus.training.context import RunContext, RunEndedError
from arplus.training.hooks import close_hooks, final_metrics, profiler
from arplus.training.hooks.base import Hook
from arplus.training.hooks.profiler import Profiler
from arplus.training.hooks.reports import Mlflow, SystemMetrics
from arplus.training.hooks.requests import EarlyStopping

AWAY = RunRef("http://127.0.0.1:9", "0", "run")


def test_system_metrics_have_mlflows_names_and_do_not_wait_for_a_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.05")
    tracker = Tracker(AWAY, record=tmp_path / "record.jsonl")
    hook = SystemMetrics(tracker)
    hook.examples = 7
    while not (lines := (tmp_path / "record.jsonl").read_text().splitlines()):
        hook.thread.join(0.05)
        assert hook.thread.is_alive()
    hook.close()
    tracker.close(timeout=0)
    points = {event["key"]: event for event in map(json.loads, lines)}
    assert {
        "system/cpu_utilization_percentage",
        "system/system_memory_usage_megabytes",
        "system/disk_usage_percentage",
        "system/network_receive_megabytes",
    } <= points.keys()
    assert points["system/cpu_utilization_percentage"]["step"] == 7
    assert 0 < points["system/system_memory_usage_percentage"]["value"] < 100


def profile_second_step(run_uri: str, tracker: Tracker) -> None:
    hook = Profiler(range(2, 3), run_uri, tracker)
    for step in range(3):
        hook.before_step(TrainProgress(fingerprint="", step=step))
        torch.ones(3 + step).cumsum(0)
        hook.after_step(TrainProgress(fingerprint="", step=step), Step([], 0))
    hook.close()


def test_a_remote_runs_profile_lies_beside_it(s3_server: Any, tmp_path: Path) -> None:
    tracker, run = Tracker(AWAY, record=tmp_path / "record.jsonl"), s3_server.uri(tmp_path.name)
    profile_second_step(run, tracker)
    tracker.close(timeout=0)
    assert "aten::cumsum" in storage.read_bytes(f"{run}/profile/steps-2-2.txt").decode()
    assert storage.exists(f"{run}/profile/steps-2-2.trace.json.gz")


def test_copies_of_a_profile_go_once_mlflow_has_them(tmp_path: Path) -> None:
    record = tmp_path / "record.jsonl"
    copy = profiler.copies(Tracker(AWAY, record=record)) / "steps-2-2.txt"
    copy.parent.mkdir(parents=True)
    copy.write_text("")
    missed = Tracker(AWAY, record=record)
    missed.log_file(copy, "profile")
    missed.close(timeout=0)
    Mlflow(missed).close()
    assert copy.exists(), "it is still to be sent by hand"
    Mlflow(Tracker(AWAY, record=record)).close()
    assert not copy.parent.exists()


def test_a_profile_that_cannot_be_written_costs_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "profile").write_text("in the way")
    profile_second_step(str(tmp_path), Tracker(AWAY, record=tmp_path / "record.jsonl"))
    assert "--profile-steps: no profile of steps-2-2: " in caplog.text


def test_a_run_that_stopped_early_is_finished_and_says_so() -> None:
    job = RunContext(
        config=TrainConfig(),
        run_uri="",
        tracked=AWAY,
        attempt=Attempt(owner="", number=1, mlflow_run_id="run"),
        start=None,
        progress_bar=None,
        versions={},
    )
    progress = TrainProgress(fingerprint="", step=5)
    for ppl in (3.0, 2.0, 2.0, 2.5):
        progress.add_validation({"response_ppl": ppl})
    with pytest.raises(RunEndedError) as ended:
        final_metrics(job, progress, 9, [EarlyStopping(3)])
    assert isinstance(ended.value.args[0], StoppedError)
    final = final_metrics(job, progress, 9, [EarlyStopping(2)])
    assert (final.stopped_early, final.best_response_ppl, final.steps) == (True, 2.0, 5)


def test_a_validation_that_is_not_a_number_is_never_the_best() -> None:
    progress = TrainProgress(fingerprint="")
    progress.add_validation({"response_ppl": math.nan})
    assert progress.best_response_ppl is None
    progress.add_validation({"response_ppl": 9.0})
    progress.add_validation({"response_ppl": math.nan})
    assert progress.best_response_ppl == 9.0


def test_a_hook_that_cannot_close_keeps_no_other_from_it() -> None:
    closed = []

    class Noting(Hook):
        def __init__(self, name: str) -> None:
            self.name = name

        def close(self) -> None:
            closed.append(self.name)
            if self.name == "first":
                raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        close_hooks([Noting("first"), Noting("second")])
    assert closed == ["first", "second"]
