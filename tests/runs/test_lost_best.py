"""A run whose best checkpoint is deleted, damaged or wrongly marked stands for its newest whole one."""

import re
from pathlib import Path

import pytest
from helpers.checkpoints import state

from arplus import storage
from arplus.errors import UsageError
from arplus.runs import checkpoint, retention
from arplus.runs.checkpoint import TrainProgress


def lose(run: str, uri: str, how: str) -> None:
    """Loses the best checkpoint ``uri`` of a run."""
    mark = storage.join(run, "best.json")
    if how == "deleted":
        storage.delete(uri)
    elif how == "deleted with its mark":
        storage.delete(uri)
        storage.delete(mark)
    elif how.startswith("marked "):
        storage.write_bytes(mark, how.removeprefix("marked ").encode())
    elif how == "changed":
        data = storage.read_bytes(storage.join(uri, "weights.safetensors"))
        storage.write_bytes(storage.join(uri, "weights.safetensors"), data[:-1] + bytes([data[-1] ^ 1]))
    elif how.startswith("manifest "):
        storage.write_bytes(storage.join(uri, "manifest.json"), how.removeprefix("manifest ").encode())
    else:
        storage.delete(storage.join(uri, how.removesuffix(" missing")))


LOSSES = (
    *("deleted", "deleted with its mark", "changed", "weights.safetensors missing", "state.json missing"),
    *("manifest.json missing", "manifest ", "manifest {}", "manifest []", 'manifest {"format": 1}', 'manifest {"for'),
    *("marked ", "marked {", "marked null", "marked []", "marked {}", 'marked {"checkpoint": 3, "response_ppl": 1}'),
    'marked {"checkpoint": "checkpoints/../../elsewhere", "response_ppl": 1}',
    'marked {"checkpoint": "../run/checkpoints/step-00000010", "response_ppl": 1}',
    'marked {"checkpoint": "checkpoints/step-00000099", "response_ppl": 1}',
)
"""Ways in which a run's best checkpoint is lost."""


@pytest.mark.parametrize("how", LOSSES)
def test_a_run_whose_best_is_lost_stands_for_its_newest_whole_one(
    run: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    best, whole, damaged = (checkpoint.save(run, state(step, seed=step)) for step in (10, 20, 30))
    checkpoint.mark_best(run, best, 60.25)
    Path(damaged, "weights.safetensors").write_bytes(b"")
    lose(run, best, how)
    uri, found = checkpoint.load_found(run)
    assert (uri, found.progress.step) == (whole, 20)
    assert checkpoint.load(run).progress.step == 20, "a second time"
    said = [r.getMessage() for r in caplog.records if "is taken instead" in r.getMessage()]
    assert len(said) >= 1
    assert any(uri in text for text in said)
    retention.retain(run, 2, attempt=0)
    assert whole in checkpoint.list_complete(run)


def test_a_best_that_was_deleted_is_said_in_one_warning(any_run: str, caplog: pytest.LogCaptureFixture) -> None:
    best, whole = (checkpoint.save(any_run, state(step)) for step in (10, 20))
    checkpoint.mark_best(any_run, best, 60.25)
    storage.delete(best)
    for _ in range(2):
        assert checkpoint.load_found(any_run)[0] == checkpoint.find(any_run) == whole
    (said,) = caplog.messages
    assert "the best checkpoint" in said
    assert best in said
    assert whole in said


def test_a_damaged_checkpoint_that_is_named_itself_stays_an_error(run: str) -> None:
    best, whole = (checkpoint.save(run, state(step)) for step in (10, 20))
    checkpoint.mark_best(run, best, 60.25)
    for how in ("weights.safetensors missing", "manifest []", "manifest.json missing"):
        lose(run, best, how)
        with pytest.raises(UsageError, match=re.escape(best)):
            checkpoint.load(best)
    lose(run, whole, "weights.safetensors missing")
    with pytest.raises(UsageError, match="no other checkpoint that is whole"):
        checkpoint.load(run)


@pytest.mark.parametrize("how", LOSSES)
@pytest.mark.parametrize("validated", [True, False])
def test_a_run_that_goes_on_after_its_best_was_lost_has_a_new_one(
    run: str, how: str, validated: bool, caplog: pytest.LogCaptureFixture
) -> None:
    best, last = (checkpoint.save(run, state(step)) for step in (10, 20))
    checkpoint.mark_best(run, best, 58.5)
    lose(run, best, how)
    validation = {"response_ppl": 61.0} if validated else {}
    progress = TrainProgress(fingerprint="abc", best_response_ppl=58.5, validation=validation)
    lowest = checkpoint.restore_best(run, last, progress)
    (said,) = caplog.messages
    if validated:
        assert lowest == 61.0
        mark = storage.read_json(storage.join(run, "best.json"))
        assert mark == {"checkpoint": "checkpoints/step-00000020", "response_ppl": 61.0}
        assert f"{last} is the best one from here on" in said
    else:
        assert lowest is None, "the next validation is better than none"
        assert "the next validation" in said
