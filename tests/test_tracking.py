import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from arplus.errors import ResourceError, UserError
from arplus.tracking import (
    Run,
    Tracker,
    check_reachable,
    client,
    compare_url,
    default_uri,
    end_children,
    end_run,
    open_command,
    register_model,
    run_url,
    start_run,
    study_url,
)
from arplus.tracking import replay as replay_record
from arplus.tracking.replay import read_record


@pytest.fixture(autouse=True)
def _no_tracking_variable(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A sqlite store, made once: its tables take seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/runs/mlflow.db"


def begin(uri, **options):
    return start_run(uri, "tests", "a run", tags={"git": "abc"}, params={"optimizer.lr": 0.1}, **options)


def points(uri, run_id, key):
    return [(m.step, m.value) for m in client.connect(uri).get_metric_history(run_id, key)]


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Server:
    """A real MLflow server on loopback that can be killed and started again on the same store."""

    def __init__(self, folder):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self.folder}/artifacts"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(f"{self.folder}/server.log", "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, "the server stopped by itself"
                time.sleep(0.2)
        raise AssertionError("the server did not start within 120 s")

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its worker
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        running.start()
        yield running
    finally:
        running.kill()


# ------------------------------------------------------------------------------------------------------------ sqlite


def test_everything_logged_arrives(store, tmp_path):
    run = begin(store)
    picture = tmp_path / "curve.png"
    picture.write_bytes(b"png")
    with Tracker(run, record=tmp_path / "record.jsonl") as tracker:
        for step in range(0, 320, 32):
            tracker.log({"train/loss": 1 / (step + 1), "perf/examples_per_s": 10.0}, step)
        tracker.log({"valid/ppl": float("nan")}, 320)
        tracker.log_text("samples/replies.txt", "你好\n")
        tracker.log_file(picture, "plots")
        tracker.log_dataset("demo", "f" * 64, "s3://bucket/data", "training")
        tracker.set_tags({"note": "x" * 10_000})
    assert tracker.dropped == 0
    mlflow = client.connect(store)
    found = mlflow.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.info.run_name == "a run"
    assert found.info.artifact_uri.startswith(os.path.dirname(store.removeprefix("sqlite:///")) + "/mlartifacts")
    assert found.data.params == {"optimizer.lr": "0.1"}
    assert found.data.tags["git"] == "abc"
    assert found.data.tags["note"] == "x" * 5000
    assert points(store, run.run_id, "train/loss") == [(step, 1 / (step + 1)) for step in range(0, 320, 32)]
    assert points(store, run.run_id, "valid/ppl")[0][1] != points(store, run.run_id, "valid/ppl")[0][1], "not a NaN"
    assert [f.path for f in mlflow.list_artifacts(run.run_id, "samples")] == ["samples/replies.txt"]
    assert [f.path for f in mlflow.list_artifacts(run.run_id, "plots")] == ["plots/curve.png"]
    (dataset,) = found.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("demo", "f" * 36)
    kinds = [set(event) - {"run_id", "timestamp"} for event in read_record(tmp_path / "record.jsonl")]
    assert kinds.count({"key", "value", "step"}) == 21
    assert {"status"} in kinds
    assert replay_record(tmp_path / "record.jsonl", store) == 0, "nothing was missing"


def test_a_run_goes_on_where_it_stopped(store, tmp_path):
    run = begin(store)
    with Tracker(run, record=tmp_path / "r.jsonl") as tracker:
        tracker.log({"train/loss": 2.0}, 1)
    again = start_run(store, "tests", "x", tags={"git": "def"}, params={"optimizer.lr": 9, "new": 1},
                      resume_run_id=run.run_id)  # fmt: skip
    assert again == run
    mlflow = client.connect(store)
    assert mlflow.get_run(run.run_id).info.status == "RUNNING"
    attempt = Tracker(again, record=tmp_path / "r.jsonl")
    attempt.log({"train/loss": 1.0}, 2)
    attempt.close()
    found = mlflow.get_run(run.run_id)
    assert found.info.status == "RUNNING", "closed without a status: the driver ends the run"
    assert found.data.params == {"optimizer.lr": "0.1", "new": "1"}
    assert found.data.tags["git"] == "def"
    assert points(store, run.run_id, "train/loss") == [(1, 2.0), (2, 1.0)]


def test_a_step_that_is_trained_again_has_one_point(store, tmp_path):
    """After a restart from a checkpoint; also where the first attempt died before it had sent everything."""
    run = begin(store)
    record = tmp_path / "r.jsonl"
    with Tracker(run, record=record) as first:
        first.log({"train/loss": 3.0}, 1)
        first.log({"train/loss": 2.0}, 2)
    second = Tracker(start_run(store, "tests", "x", tags={}, params={}, resume_run_id=run.run_id), record=record)
    second.log({"train/loss": 2.0, "valid/ppl": 9.0}, 2)
    second.log({"train/loss": 1.0}, 3)
    assert second.close("FINISHED") == 0
    assert points(store, run.run_id, "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]
    assert points(store, run.run_id, "valid/ppl") == [(2, 9.0)]
    assert replay_record(record, store) == 0
    elsewhere = begin(store)
    record.write_text(record.read_text().replace(run.run_id, elsewhere.run_id))
    replay_record(record, store)
    assert points(store, elsewhere.run_id, "train/loss") == [(1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_run_that_was_deleted_is_replaced_with_a_warning(store, caplog):
    run = begin(store)
    client.connect(store).delete_run(run.run_id)
    again = begin(store, resume_run_id=run.run_id)
    assert again.run_id != run.run_id
    assert run.run_id in caplog.text


def test_a_child_run_names_its_parent(store):
    parent = begin(store)
    child = begin(store, parent_run_id=parent.run_id)
    assert client.connect(store).get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id


def test_a_deleted_experiment_is_the_users_to_restore(store):
    run = start_run(store, "gone", "r", tags={}, params={})
    client.connect(store).delete_experiment(run.experiment_id)
    with pytest.raises(UserError, match="--experiment gone: was deleted"):
        start_run(store, "gone", "r", tags={}, params={})


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_run_that_does_not_finish_is_closed_as_such(store, tmp_path, error, status):
    run = begin(store)
    with pytest.raises(error), Tracker(run, record=tmp_path / "r.jsonl"):
        raise error
    assert client.connect(store).get_run(run.run_id).info.status == status


def test_a_run_can_be_marked_before_the_end(store, tmp_path):
    run = begin(store)
    tracker = Tracker(run, record=tmp_path / "record.jsonl")
    tracker.mark("KILLED")
    deadline = time.monotonic() + 60
    while client.connect(store).get_run(run.run_id).info.status != "KILLED":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    tracker.close("FINISHED")
    assert client.connect(store).get_run(run.run_id).info.status == "FINISHED"


def test_two_processes_make_the_same_store_and_experiment_at_once(tmp_path):
    program = """
import os, sys, time
from arplus.tracking import client, start_run
client._load()
open(sys.argv[2], "w").close()
while not os.path.exists(sys.argv[3]):
    time.sleep(0.001)
print(start_run(sys.argv[1], "shared", "r", tags={}, params={}).experiment_id)
"""
    uri = f"sqlite:///{tmp_path}/new/mlflow.db"
    go = tmp_path / "go"
    ready = [tmp_path / f"ready{n}" for n in range(2)]
    both = [
        subprocess.Popen([sys.executable, "-c", program, uri, r, go], stdout=subprocess.PIPE, text=True) for r in ready
    ]
    try:
        deadline = time.monotonic() + 120
        while not all(r.exists() for r in ready) and time.monotonic() < deadline:
            time.sleep(0.01)
        go.touch()
        answers = [process.communicate(timeout=120)[0].strip() for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0]
    assert answers[0] == answers[1] != ""


def test_an_experiment_that_another_process_made_meanwhile_is_taken(store, monkeypatch):
    run = begin(store)
    mlflow = client.connect(store)
    answers = [None]
    real = mlflow.get_experiment_by_name
    monkeypatch.setattr(mlflow, "get_experiment_by_name", lambda name: answers.pop() if answers else real(name))
    assert client._experiment_id(mlflow, store, "tests") == run.experiment_id


# ----------------------------------------------------------------------------------------- a server that is not there


@pytest.mark.parametrize("kind", ["store", "server"])
def test_a_model_is_registered_once_a_run_and_its_alias_moves(kind, request, tmp_path):
    uri = getattr(request.getfixturevalue(kind), "uri", None) or request.getfixturevalue(kind)
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    versions = []
    for number in range(2):
        run = begin(uri)
        with Tracker(run, record=tmp_path / "r.jsonl") as tracker:
            tracker.log_file(weights, "checkpoint")
        versions.append(register_model(run, "checkpoint", f"best of {kind}", "best", {"number": str(number)}))
        assert register_model(run, "checkpoint", f"best of {kind}", "best", {}) == versions[-1], "no second version"
    assert versions == ["1", "2"]
    mlflow = client.connect(uri)
    found = mlflow.get_model_version_by_alias(f"best of {kind}", "best")
    assert (str(found.version), found.run_id, found.tags) == ("2", run.run_id, {"number": "1"})
    copy = mlflow.download_artifacts(found.run_id, "checkpoint/weights.safetensors", str(tmp_path))
    assert Path(copy).read_bytes() == b"weights"


def test_the_children_that_nobody_ends_are_ended(store, tmp_path):
    parent, other = begin(store), begin(store)
    children = [begin(store, parent_run_id=parent.run_id) for _ in range(3)]
    stranger = begin(store, parent_run_id=other.run_id)
    end_run(children[0], "FINISHED", {"outcome": "stopped early"})
    assert end_children(parent) == 2
    mlflow = client.connect(store)
    assert [mlflow.get_run(run.run_id).info.status for run in children] == ["FINISHED", "KILLED", "KILLED"]
    assert mlflow.get_run(children[0].run_id).data.tags["outcome"] == "stopped early"
    assert {mlflow.get_run(run.run_id).info.status for run in (parent, stranger)} == {"RUNNING"}
    Tracker(stranger, record=tmp_path / "r.jsonl").close("FINISHED")


def test_where_runs_are_compared():
    runs = [Run("http://h:5000", "7", "a"), Run("http://h:5000", "7", "b")]
    assert study_url(runs[0]) == "http://h:5000/#/experiments/7/runs"
    assert compare_url(runs) == (
        "http://h:5000/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%227%22%5D"
    )


class Refusing:
    """A client without a server."""

    def __getattr__(self, name):
        raise ConnectionError("connection refused")


@pytest.fixture
def no_server(monkeypatch):
    monkeypatch.setattr("arplus.tracking.tracker.make_client", lambda uri: Refusing())
    return Run("http://user:hunter2@127.0.0.1:1", "1", "0" * 32)


def test_a_full_queue_drops_counts_and_says_so_once(no_server, tmp_path, caplog):
    tracker = Tracker(no_server, record=tmp_path / "r.jsonl", capacity=10)
    for step in range(100):
        tracker.log({"a": 1.0, "b": 2.0}, step)
    assert tracker.close("FINISHED", timeout=0.1) == 201, "200 points and the status"
    assert sum("queue to MLflow is full" in r.getMessage() for r in caplog.records) == 1
    assert sum(r.getMessage().startswith("MLflow does not answer") for r in caplog.records) == 1
    assert "misses 201 logged values" in caplog.text
    assert "replay" in caplog.text
    assert "hunter2" not in caplog.text
    events = list(read_record(tmp_path / "r.jsonl"))
    assert [(e["key"], e["step"]) for e in events[:-1]] == [(key, step) for step in range(100) for key in "ab"]


def test_close_keeps_its_time_limit(no_server, tmp_path):
    tracker = Tracker(no_server, record=tmp_path / "r.jsonl")
    tracker.log({"a": 1.0}, 1)
    start = time.monotonic()
    tracker.close("KILLED", timeout=0.5)
    assert time.monotonic() - start < 2


def test_one_refused_value_does_not_hold_up_the_next(store, tmp_path, caplog):
    run = begin(store)
    with Tracker(run, record=tmp_path / "r.jsonl") as tracker:
        tracker.log({"not a key!": 1.0}, 1)
        time.sleep(0.5)  # a batch of its own
        tracker.log_file(tmp_path / "missing.png")
        tracker.log({"good": 1.0}, 2)
    assert tracker.dropped == 2
    assert "refused" in caplog.text
    assert points(store, run.run_id, "good") == [(2, 1.0)]


def test_a_full_disk_does_not_end_the_training(store, tmp_path, caplog):
    run = begin(store)
    with Tracker(run, record="/dev/full") as tracker:
        tracker.log({"train/loss": 1.0}, 1)
    assert points(store, run.run_id, "train/loss") == [(1, 1.0)]
    assert "cannot write the record" in caplog.text


def test_a_closed_port_is_a_resource_error_that_names_address_and_flag():
    uri = f"http://me:hunter2@127.0.0.1:{free_port()}"
    start = time.monotonic()
    with pytest.raises(ResourceError, match=r"http://\*\*\*@127.*--mlflow") as caught:
        check_reachable(uri)
    assert time.monotonic() - start < 20
    assert "hunter2" not in str(caught.value)


def test_a_silent_port_is_a_resource_error_in_time(monkeypatch):
    monkeypatch.setattr(client, "_REACH_S", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        start = time.monotonic()
        with pytest.raises(ResourceError, match="no answer within 1 s"):
            start_run(f"http://127.0.0.1:{silent.getsockname()[1]}", "e", "r", tags={}, params={})
        assert time.monotonic() - start < 10


# ------------------------------------------------------------------------------------------------------------ server


def test_a_server_killed_in_mid_run_costs_nothing(server, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    record = tmp_path / "record.jsonl"
    run = begin(server.uri)
    tracker = Tracker(run, record=record)
    for step in range(5):
        tracker.log({"train/loss": float(step)}, step)
    deadline = time.monotonic() + 30
    while len(points(server.uri, run.run_id, "train/loss")) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    server.kill()
    slowest = 0.0
    for step in range(5, 2000):
        start = time.monotonic()
        tracker.log({"train/loss": float(step), "valid/ppl": 2.0}, step)
        slowest = max(slowest, time.monotonic() - start)
    tracker.log_text("replies.txt", "好")
    tracker.set_tags({"late": "yes"})
    missed = tracker.close("KILLED", timeout=1)
    assert slowest < 0.5, "logging waited for a dead server"
    assert missed == 2 * 1995 + 3
    assert str(record) in caplog.text

    server.start()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW")}
    command = [sys.executable, "-m", "arplus.tracking", "replay", str(record), "--mlflow", server.uri]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith(f"{missed} values sent")
    assert points(server.uri, run.run_id, "train/loss") == [(step, float(step)) for step in range(2000)]
    assert len(points(server.uri, run.run_id, "valid/ppl")) == 1995
    mlflow = client.connect(server.uri)
    found = mlflow.get_run(run.run_id)
    assert (found.info.status, found.data.tags["late"]) == ("KILLED", "yes")
    assert [f.path for f in mlflow.list_artifacts(run.run_id)] == ["replies.txt"]
    assert replay_record(record, server.uri) == 0, "a second replay sends nothing"

    # The server is back for a run that has gone on meanwhile: its end is not overwritten by the older record's.
    again = begin(server.uri, resume_run_id=run.run_id)
    with Tracker(again, record=tmp_path / "second.jsonl") as attempt:
        attempt.log({"train/loss": 0.0}, 2000)
    assert replay_record(record, server.uri) == 0
    assert mlflow.get_run(run.run_id).info.status == "FINISHED"


def test_an_outage_is_made_up_for_without_replay(server, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    run = begin(server.uri)
    server.kill()
    tracker = Tracker(run, record=tmp_path / "r.jsonl")
    for step in range(1500):
        tracker.log({"train/loss": float(step)}, step)
    deadline = time.monotonic() + 30
    while "does not answer" not in caplog.text and time.monotonic() < deadline:
        time.sleep(0.05)
    server.start()
    assert tracker.close("FINISHED", timeout=60) == 0
    assert "answers again" in caplog.text
    assert points(server.uri, run.run_id, "train/loss") == [(step, float(step)) for step in range(1500)]


# ------------------------------------------------------------------------------------------------- addresses, records


def test_the_default_is_a_sqlite_file_under_local_storage(tmp_path, monkeypatch):
    assert default_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert default_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    with pytest.raises(UserError, match=r"s3://bucket/runs.*--mlflow"):
        default_uri("s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_uri("s3://bucket/runs") == "http://127.0.0.1:5000"


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///x", "postgresql://u:hunter2@h/db"])
def test_other_stores_are_refused(uri):
    with pytest.raises(UserError, match="--mlflow") as caught:
        check_reachable(uri)
    assert "hunter2" not in str(caught.value)


def test_how_to_open_a_run(tmp_path):
    local = Run(f"sqlite:///{tmp_path}/mlflow.db", "3", "abc")
    assert f"ui --workers 1 --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in open_command(local.uri)
    assert run_url(local) == "http://127.0.0.1:5000/#/experiments/3/runs/abc"
    remote = Run("https://mlflow.example.org", "3", "abc")
    assert open_command(remote.uri) is None
    assert run_url(remote) == "https://mlflow.example.org/#/experiments/3/runs/abc"


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path, caplog, no_server):
    record = tmp_path / "r.jsonl"
    record.write_text('{"run_id": "x", "timestamp": 1, "key": "a", "value": 1.0, "step": 1}\n{"run_id": "x", "tim')
    tracker = Tracker(no_server, record=record)
    tracker.log({"b": 1.0}, 2)
    tracker.close(timeout=0)
    assert [event["key"] for event in read_record(record)] == ["a", "b"]
    assert "1 broken lines" in caplog.text
    assert json.loads(record.read_text().splitlines()[-1])["key"] == "b"
    with pytest.raises(UserError, match=r"no\.jsonl"):
        list(read_record(tmp_path / "no.jsonl"))
