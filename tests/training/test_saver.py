"""Checkpoints are written beside the training, in order, whatever the storage does meanwhile."""

import json
import threading
from pathlib import Path

import pytest
import torch
from helpers.prepared import CHARACTERS, PERSONA_WORDS

from arplus import storage
from arplus.config import ExampleRules, preset, tiny
from arplus.errors import ResourceError, UsageError
from arplus.runs import checkpoint
from arplus.runs.attempt import SupersededError
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.training.saver import Saver


@pytest.fixture
def run(tmp_path):
    return str(tmp_path / "run")


def state(step):
    return TrainState(
        config=tiny(preset("arplus")),
        progress=TrainProgress(fingerprint="test", step=step),
        schedule={},
        rules=ExampleRules(),
        characters=CHARACTERS,
        persona_words=PERSONA_WORDS,
        weights={"a": torch.tensor([float(step)])},
        moments={},
    )


def a_saver(run, check=lambda: None, keep=2):
    return Saver(run, attempt=1, keep=keep, check=check)


def steps(run):
    return [checkpoint.load(uri).progress.step for uri in checkpoint.list_complete(run)]


def test_it_writes_marks_the_best_and_removes(run):
    mine = a_saver(run, keep=1)
    for step, best in ((10, 3.0), (20, None), (30, None)):
        mine.save(state(step), best)
    mine.wait()
    assert mine.error is None
    assert steps(run) == [10, 30]
    assert mine.newest == checkpoint.list_complete(run)[-1]
    assert json.loads(Path(run, "best.json").read_text())["response_ppl"] == 3.0


def test_training_goes_on_meanwhile_and_one_is_written_at_a_time(run, monkeypatch):
    writing, go_on = threading.Semaphore(0), threading.Semaphore(0)
    save, at_once = checkpoint.save, []

    def slow(*arguments, **named):
        at_once.append(1)
        assert sum(at_once) == 1
        writing.release()
        assert go_on.acquire(timeout=20)
        at_once.pop()
        return save(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save", slow)
    mine = a_saver(run)
    mine.save(state(10), None)  # returns although the write waits
    assert writing.acquire(timeout=20)
    assert steps(run) == []
    second = threading.Thread(target=mine.save, args=(state(20), None))
    second.start()
    second.join(0.2)
    assert second.is_alive(), "it waits for the first"
    go_on.release(2)
    second.join(20)
    mine.wait()
    assert mine.error is None
    assert steps(run) == [10, 20]


def test_an_error_is_kept_and_ends_the_saving(run):
    Path(run).mkdir(parents=True)
    Path(run, "checkpoints").write_text("in the way")
    mine = a_saver(run)
    mine.save(state(10), None)
    mine.wait()
    assert isinstance(mine.error, UsageError)
    Path(run, "checkpoints").unlink()
    mine.save(state(20), None)
    mine.wait()
    assert steps(run) == []


def replaced_at(look):
    """A check that finds the attempt replaced from this look on."""
    looks = []

    def check():
        looks.append(1)
        if len(looks) >= look:
            raise SupersededError("replaced")

    return check


@pytest.mark.parametrize("refused", [1, 2])
def test_a_stale_attempt_completes_nothing(run, refused):
    """At the first look, before anything is written, or at the second, before the manifest."""
    mine = a_saver(run, replaced_at(refused))
    mine.save(state(10), 3.0)
    mine.wait()
    assert isinstance(mine.error, SupersededError)
    assert checkpoint.list_complete(run) == []
    assert not Path(run, "best.json").exists()
    assert Path(run, "checkpoints").exists() == (refused == 2)


def test_a_stale_attempt_removes_nothing_and_marks_nothing(run):
    """Replaced between its manifest and what follows it."""
    before = checkpoint.save(run, state(5), attempt=1)
    checkpoint.mark_best(run, before, 4.0)
    mine = a_saver(run, replaced_at(3), keep=1)
    mine.save(state(10), 3.0)
    mine.wait()
    assert isinstance(mine.error, SupersededError)
    assert steps(run) == [5, 10]
    assert checkpoint.find(run) == before


def half_written(run, attempt):
    half = Path(run, "checkpoints", f"step-00000005-attempt-{attempt}", "weights.safetensors")
    half.parent.mkdir(parents=True)
    half.write_bytes(b"half")
    return half


def test_what_the_next_attempt_is_writing_stays(run):
    """Where this one is replaced so late that it does not see it."""
    half = half_written(run, 2)
    mine = a_saver(run)
    mine.save(state(10), None)
    mine.wait()
    assert mine.error is None
    assert half.exists()


def test_a_failure_after_the_manifest_leaves_the_checkpoint_alone(s3_server, tmp_path, monkeypatch):
    run = s3_server.uri(tmp_path.name)
    mark, save, saved = checkpoint.mark_best, checkpoint.save, []
    failures = iter([ResourceError("away")])

    def failing_once(*arguments):
        for error in failures:
            raise error
        mark(*arguments)

    monkeypatch.setattr(checkpoint, "mark_best", failing_once)
    monkeypatch.setattr(checkpoint, "save", lambda *a, **k: saved.append(1) or save(*a, **k))
    mine = a_saver(run)
    mine.save(state(10), 3.0)
    mine.wait()
    assert mine.error is None
    assert len(saved) == 1
    assert storage.read_json(f"{run}/best.json")["response_ppl"] == 3.0


def test_what_an_earlier_save_left_half_written_is_removed(run):
    half = half_written(run, 1)
    mine = a_saver(run)
    mine.save(state(10), None)
    mine.wait()
    assert not half.parent.exists()
    assert steps(run) == [10]


def test_s3_that_refuses_for_a_while_costs_no_checkpoint(s3_server, tmp_path, refusing):
    """As it does, too, when a token has run out before the next one is there."""
    run = s3_server.uri(tmp_path.name)
    mine = a_saver(run)
    with refusing():
        mine.save(state(10), 3.0)
        mine.wait()
    assert mine.error is None
    assert steps(run) == [10]


def test_storage_that_is_away_at_a_check_is_waited_for(s3_server, tmp_path):
    uri, looks = s3_server.uri(f"saver/{tmp_path.name}"), []

    def check():
        looks.append(1)
        if len(looks) in (1, 4):  # as the save begins, and before best.json
            raise ResourceError("away for a moment")

    mine = Saver(uri, attempt=1, keep=2, check=check)
    mine.save(state(10), 20.0)
    mine.wait()
    assert mine.error is None
    assert checkpoint.find(uri) == mine.newest
    assert len(looks) == 5
