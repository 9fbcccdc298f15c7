"""Checkpoints that are no longer needed go, and what is needed stays, in bytes too."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import state, step_of

from arplus import storage
from arplus.errors import UsageError
from arplus.runs import checkpoint, retention


@pytest.mark.parametrize(
    ("best", "newest", "kept"),
    [
        (None, 2, [40, 50]),
        (20, 2, [20, 40, 50]),
        (50, 2, [40, 50]),
        (20, 1, [20, 50]),
        (None, 9, [10, 20, 30, 40, 50]),
        (None, "all", [10, 20, 30, 40, 50]),
    ],
)
def test_retain_keeps_the_best_and_the_newest(
    run: str, best: int | None, newest: retention.Keep, kept: list[int]
) -> None:
    for step in (10, 20, 30, 40, 50):
        uri = checkpoint.save(run, state(step))
        if step == best:
            checkpoint.mark_best(run, uri, 60.25)
    retention.retain(run, newest, attempt=0)
    assert list(map(step_of, checkpoint.list_complete(run))) == kept
    assert sorted(path.name for path in Path(run, "checkpoints").iterdir()) == [f"step-{step:08d}" for step in kept]


def test_retain_works_on_s3(s3_server: Any, tmp_path: Path) -> None:
    run = s3_server.uri(f"retain/{tmp_path.name}")
    uris = [checkpoint.save(run, state(step)) for step in (10, 20, 30)]
    checkpoint.mark_best(run, uris[0], 60.25)
    retention.retain(run, 1, attempt=0)
    assert checkpoint.list_complete(run) == [uris[0], uris[2]]
    assert len(storage.list_files(storage.join(run, "checkpoints"))) == 2 * len(checkpoint.FILES)


def test_retain_that_dies_leaves_no_half_checkpoint(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (10, 20):
        checkpoint.save(run, state(step))
    delete = storage.delete

    def dying(uri: str) -> None:
        if not uri.endswith("manifest.json"):
            raise KeyboardInterrupt
        delete(uri)

    monkeypatch.setattr(storage, "delete", dying)
    with pytest.raises(KeyboardInterrupt):
        retention.retain(run, 1, attempt=0)
    assert list(map(step_of, checkpoint.list_complete(run))) == [20]


def test_retain_leaves_what_is_no_checkpoint(run: str) -> None:
    for step in (10, 20):
        uri = checkpoint.save(run, state(step))
    names = ["notes.txt", "mine/manifest.json", "step-00000020/tracking/manifest.json", "step-00000015/tracking/a.json"]
    for name in names:
        storage.write_bytes(storage.join(run, "checkpoints", name), b"{}")
    retention.retain(run, 1, attempt=0)
    assert checkpoint.list_complete(run) == [uri]
    assert sorted(path.name for path in Path(run, "checkpoints").iterdir()) == ["mine", "notes.txt", "step-00000020"]


def stored(run: str) -> int:
    """Bytes under a run's checkpoints."""
    return sum(len(storage.read_bytes(file)) for file in storage.list_files(storage.join(run, "checkpoints")))


def test_of_a_run_that_has_ended_the_best_weights_stay(any_run: str) -> None:
    states = [state(step) for step in (10, 20, 30)]
    uris = [checkpoint.save(any_run, each) for each in states]
    checkpoint.mark_best(any_run, uris[1], 60.25)
    before = stored(any_run)
    for _ in range(2):  # a second time it finds nothing to do
        retention.keep_best_weights(any_run)
        assert checkpoint.list_complete(any_run) == [uris[1]]
        assert stored(any_run) < before / 3 * 0.45, "a third of one of three, and its small files"
        found = checkpoint.load(any_run, moments=True)
        assert found.moments == {}
        assert all(torch.equal(found.weights[name], weight) for name, weight in states[1].weights.items())
    retention.delete_all(any_run)
    assert not storage.list_files(storage.join(any_run, "checkpoints"), missing_ok=True)
    with pytest.raises(UsageError, match=r"best checkpoint, .*step-00000020, is not there .*--keep-checkpoints all"):
        checkpoint.load(any_run)
    retention.keep_best_weights(any_run)  # nothing, and no error


def test_a_checkpoint_whose_state_is_being_taken_off_can_be_read(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = checkpoint.save(run, state())

    def dying(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write_json", dying)
        with pytest.raises(KeyboardInterrupt):
            retention.keep_best_weights(run)
    assert checkpoint.load(run).weights.keys() == state().weights.keys()
    retention.keep_best_weights(run)
    assert checkpoint.load(uri, moments=True).moments == {}
