"""MLflow that is slow, full, refusing or gone costs the training nothing, and values can be logged afterwards."""

import json
import logging
import os
import socket
import subprocess
import sys
import time

import pytest
from helpers.logged_runs import begin, free_port, points

from arplus.errors import ResourceError, UsageError
from arplus.tracking import Tracker, check_reachable, client, start_run
from arplus.tracking import replay as replay_record
from arplus.tracking.replay import read_record


def test_a_full_queue_drops_counts_and_says_so_once(no_server, tmp_path, caplog):
    tracker = Tracker(no_server, record=tmp_path / "r.jsonl", capacity=10)
    for step in range(100):
        tracker.log({"a": 1.0, "b": 2.0}, step)
    assert tracker.close("FINISHED", timeout=0.1) == 201, "200 points and the status"
    assert sum("queue to MLflow is full" in r.getMessage() for r in caplog.records) == 1
    assert sum(r.getMessage().startswith("MLflow does not answer") for r in caplog.records) == 1
    assert "lacks 201 logged values" in caplog.text
    assert "replay" in caplog.text
    assert "hunter2" not in caplog.text
    events = list(read_record(tmp_path / "r.jsonl"))
    assert [(e["key"], e["step"]) for e in events[:-1]] == [(key, step) for step in range(100) for key in "ab"]


@pytest.mark.processes
def test_a_file_that_waits_is_given_the_time_of_a_slow_server(no_server, tmp_path, monkeypatch):
    monkeypatch.setattr("arplus.tracking.tracker._BYTES_A_SECOND", 1000)
    (tmp_path / "weights").write_bytes(bytes(1200))
    tracker = Tracker(no_server, record=tmp_path / "r.jsonl")
    tracker.log_file(tmp_path / "weights")
    start = time.monotonic()
    tracker.close("FINISHED", timeout=0.1)
    assert 1.2 < time.monotonic() - start < 3


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


@pytest.mark.processes
@pytest.mark.parametrize(("error", "lost"), [(ConnectionError("refused"), 0), (OSError("HTTP 500"), 1)])
def test_a_tag_waits_for_a_server_that_is_away_and_not_for_one_that_answers(
    store, tmp_path, monkeypatch, caplog, error, lost
):
    """Which goes on with the metrics behind it."""
    error.code = 500 if lost else None
    send, sent, tried = client.send, [], []

    def fail(mlflow, events):
        if "tag" in events[0] and len(tried) < 6:
            tried.append(events)
            raise error
        send(mlflow, events)
        sent.append(events)

    monkeypatch.setattr("arplus.tracking.tracker.send", fail)
    monkeypatch.setattr("arplus.tracking.tracker._GIVE_UP_S", 0.2)
    monkeypatch.setattr("arplus.tracking.tracker._LONGEST_WAIT_S", 0.05)
    tracker = Tracker(begin(store), record=tmp_path / "r.jsonl")
    tracker.set_tags({"best": "a"})
    tracker.log({"good": 1.0}, 2)
    deadline = time.monotonic() + 20
    while not any("key" in events[0] for events in sent) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert tracker.close("FINISHED") == lost
    assert any("tag" in events[0] for events in sent) != bool(lost)


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


def test_a_line_torn_by_a_kill_spoils_no_other(tmp_path, caplog, no_server):
    record = tmp_path / "r.jsonl"
    record.write_text('{"run_id": "x", "timestamp": 1, "key": "a", "value": 1.0, "step": 1}\n{"run_id": "x", "tim')
    tracker = Tracker(no_server, record=record)
    tracker.log({"b": 1.0}, 2)
    tracker.close(timeout=0)
    assert [event["key"] for event in read_record(record)] == ["a", "b"]
    assert "1 broken lines" in caplog.text
    assert json.loads(record.read_text().splitlines()[-1])["key"] == "b"
    with pytest.raises(UsageError, match=r"no\.jsonl"):
        list(read_record(tmp_path / "no.jsonl"))
