"""What a run logs arrives, once, in a sqlite store."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.logged_runs import begin, points

from arplus.errors import UsageError
from arplus.tracking import Tracker, client, end_children, end_run, register_model, start_run
from arplus.tracking import replay as replay_record
from arplus.tracking.replay import read_record


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


def test_of_two_evaluations_at_one_step_the_second_is_replayed_too(store, tmp_path):
    """Whose artifact has the name of the first one's."""
    run = begin(store)
    for ppl, record in (1.0, "first"), (2.0, "second"):
        with Tracker(run, record=tmp_path / record, repeats=True) as tracker:
            tracker.log({"test/ppl": ppl}, 100)
            tracker.log_text("evaluation_test.json", f"ppl {ppl}")
            tracker.set_tags({"ppl": str(ppl)})
        time.sleep(0.01)  # timestamps are milliseconds
    elsewhere = begin(store)
    for record, sent in ("first", 4), ("second", 3):
        file = tmp_path / record
        file.write_text(file.read_text().replace(run.run_id, elsewhere.run_id))
        assert replay_record(file, store) == sent, "all but a status that is the same"
    assert points(store, elsewhere.run_id, "test/ppl") == [(100, 1.0), (100, 2.0)]
    mlflow = client.connect(store)
    for _ in range(2):
        assert mlflow.get_run(elsewhere.run_id).data.tags["ppl"] == "2.0"
        found = mlflow.download_artifacts(elsewhere.run_id, "evaluation_test.json", str(tmp_path))
        assert Path(found).read_text() == "ppl 2.0"
        assert replay_record(tmp_path / "second", store) == 0
        assert replay_record(tmp_path / "first", store) == 0, "which is older than what the run has by now"


def test_a_file_that_was_sent_before_it_changed_is_sent_again(store, tmp_path):
    run = begin(store)
    file = tmp_path / "trials.csv"
    with Tracker(run, record=tmp_path / "r") as tracker:
        file.write_text("a,b\n1,2\n")
        tracker.log_file(file, "tables")
    file.write_text("a,b\n1,3\n")
    assert replay_record(tmp_path / "r", store) == 1
    file.unlink()
    assert replay_record(tmp_path / "r", store) == 0, "of a file that is gone the run has what there is"


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
    with pytest.raises(UsageError, match="--experiment gone: was deleted"):
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


@pytest.mark.processes
def test_two_processes_make_the_same_store_and_experiment_at_once(tmp_path):
    program = """
import os, sys, time
from arplus.tracking import client, start_run
client.make_client("http://127.0.0.1:9")  # which imports MLflow
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


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    client.connect(f"sqlite:///{tmp_path}/before.db")  # the tables, which the tests make once, are there
    monkeypatch.setattr(fcntl, "flock", refuse)
    said = rf"^{tmp_path}/mlflow.db: sqlite needs locks, and this file system has none \(No locks available\); name a "
    with pytest.raises(UsageError, match=said):
        client.connect(f"sqlite:///{tmp_path}/mlflow.db")


def test_an_experiment_that_another_process_made_meanwhile_is_taken(store, monkeypatch):
    run = begin(store)
    mlflow = client.connect(store)
    answers = [None]
    real = mlflow.get_experiment_by_name
    monkeypatch.setattr(mlflow, "get_experiment_by_name", lambda name: answers.pop() if answers else real(name))
    assert client.find_or_make_experiment(mlflow, store, "tests") == run.experiment_id


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["store", "server"])
def test_a_model_is_registered_once_a_run_and_its_alias_moves(kind, request, tmp_path):
    uri = getattr(request.getfixturevalue(kind), "uri", None) or request.getfixturevalue(kind)
    name = f"""the "best" of 今天's {kind}"""
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"weights")
    versions = []
    for number in range(2):
        run = begin(uri)
        with Tracker(run, record=tmp_path / "r.jsonl") as tracker:
            tracker.log_file(weights, "checkpoint")
        versions.append(register_model(run, "checkpoint", name, "best", {"number": str(number)}, "a model"))
        assert register_model(run, "checkpoint", name, "best", {}, "") == versions[-1], "no second version"
    assert versions == ["1", "2"]
    mlflow = client.connect(uri)
    found = mlflow.get_model_version_by_alias(name, "best")
    assert (str(found.version), found.run_id, found.tags) == ("2", run.run_id, {"number": "1"})
    copy = mlflow.download_artifacts(found.run_id, "checkpoint/weights.safetensors", str(tmp_path))
    assert Path(copy).read_bytes() == b"weights"


def test_the_children_that_nobody_ends_are_ended(store, tmp_path):
    parent, other = begin(store), begin(store)
    children = [begin(store, parent_run_id=parent.run_id) for _ in range(3)]
    stranger = begin(store, parent_run_id=other.run_id)
    end_run(children[0], "FINISHED", {"outcome": "stopped early"})
    end_children(parent)
    mlflow = client.connect(store)
    assert [mlflow.get_run(run.run_id).info.status for run in children] == ["FINISHED", "KILLED", "KILLED"]
    assert mlflow.get_run(children[0].run_id).data.tags["outcome"] == "stopped early"
    assert {mlflow.get_run(run.run_id).info.status for run in (parent, stranger)} == {"RUNNING"}
    Tracker(stranger, record=tmp_path / "r.jsonl").close("FINISHED")
