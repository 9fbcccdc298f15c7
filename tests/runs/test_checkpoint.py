"""A checkpoint is read as it was written, or refused."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.checkpoints import CHARACTERS, PERSONA_WORDS, state, step_of

from arplus import storage
from arplus.errors import UsageError
from arplus.runs import checkpoint
from arplus.runs.checkpoint import FORMAT, TrainProgress
from arplus.text import sizes

FILES = {
    "weights.safetensors",
    "optimizer.safetensors",
    "state.json",
    "config.json",
    "characters.txt",
    "persona_words.txt",
}


def assert_same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


# -------------------------------------------------------------------------------------------------------- round trip


def test_a_state_survives(any_run: str) -> None:
    saved = state()
    uri = checkpoint.save(any_run, saved)
    assert uri == storage.join(any_run, "checkpoints", "step-00000120")
    loaded = checkpoint.load(uri, moments=True)
    assert_same_tensors(loaded.weights, saved.weights)
    assert_same_tensors(loaded.moments, saved.moments)
    assert replace(loaded, weights={}, moments={}) == replace(saved, weights={}, moments={})
    assert loaded.sizes == sizes(CHARACTERS, PERSONA_WORDS)


def test_a_state_at_the_start_survives(run: str) -> None:
    saved = replace(state(), progress=TrainProgress(fingerprint="abc"), mlflow_run_id=None, moments={}, weights={})
    loaded = checkpoint.load(checkpoint.save(run, saved), moments=True)
    assert loaded == saved
    assert loaded.progress.best_response_ppl is None


def test_moments_are_read_on_request_alone(run: str) -> None:
    uri = checkpoint.save(run, state())
    Path(uri, "optimizer.safetensors").unlink()
    assert checkpoint.load(uri).moments == {}
    with pytest.raises(UsageError, match=r"optimizer\.safetensors: no such file"):
        checkpoint.load(uri, moments=True)


@pytest.mark.parametrize("name", ["ar", "arplus", "no-memn2n"])
def test_the_model_of_a_checkpoint_has_its_weights(run: str, name: str) -> None:
    saved = state(name=name)
    model = checkpoint.build_model(checkpoint.load(checkpoint.save(run, saved)))
    assert not model.training
    assert_same_tensors(model.weights(), saved.weights)


def test_a_checkpoint_is_plain_files_without_pickle(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle is used")

    for module, name in [(torch, "save"), (torch, "load"), (pickle, "dumps"), (pickle, "loads"), (pickle, "load")]:
        monkeypatch.setattr(module, name, refuse)
    uri = checkpoint.save(run, state())
    checkpoint.load(uri, moments=True)
    assert {path.name for path in Path(uri).iterdir()} == FILES | {"manifest.json"}
    for name in ("state.json", "config.json", "manifest.json"):
        assert isinstance(json.loads(Path(uri, name).read_text()), dict)
    for name in ("weights.safetensors", "optimizer.safetensors"):
        data = Path(uri, name).read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        assert {entry["dtype"] for entry in header.values()} == {"F32"}


def test_the_manifest_describes_every_file(run: str) -> None:
    uri = checkpoint.save(run, state())
    manifest = json.loads(Path(uri, "manifest.json").read_text())
    assert manifest["format"] == FORMAT
    assert manifest["files"].keys() == FILES
    for name, entry in manifest["files"].items():
        data = Path(uri, name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


# ------------------------------------------------------------------------------------------------------ what is whole


def test_a_save_that_dies_is_passed_over(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = checkpoint.save(run, state(100))
    write = storage.write_bytes
    for survived in range(len(FILES) + 1):
        left = survived

        def dying(uri: str, data: bytes) -> None:
            nonlocal left
            if not left:
                raise KeyboardInterrupt
            left -= 1
            write(uri, data)

        with monkeypatch.context() as patched:
            patched.setattr(storage, "write_bytes", dying)
            with pytest.raises(KeyboardInterrupt):
                checkpoint.save(run, state(200))
        assert checkpoint.list_complete(run) == [whole]
        assert checkpoint.find(run) == whole
        with pytest.raises(UsageError, match="no complete checkpoint"):
            checkpoint.load(storage.join(run, "checkpoints", "step-00000200"))
    assert checkpoint.find(run) != checkpoint.save(run, state(200)) == checkpoint.find(run)


def test_a_save_takes_away_what_is_there_manifest_first(run: str, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = checkpoint.save(run, state(100, seed=1))
    Path(uri, "stray").write_bytes(b"of a save that died")
    delete = storage.delete

    def dying(target: str) -> None:
        if not target.endswith("manifest.json"):
            raise KeyboardInterrupt
        delete(target)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "delete", dying)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(run, state(100, seed=2))
    assert checkpoint.list_complete(run) == []
    saved = state(100, seed=2)
    checkpoint.save(run, saved)
    assert not Path(uri, "stray").exists()
    assert_same_tensors(checkpoint.load(uri).weights, saved.weights)


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.parametrize("damage", ["truncated", "changed", "missing"])
def test_a_damaged_file_is_refused_by_name(run: str, name: str, damage: str) -> None:
    uri = checkpoint.save(run, state())
    path = Path(uri, name)
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(data[:-1])
    else:
        path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    with pytest.raises(UsageError) as caught:
        checkpoint.load(uri, moments=True)
    assert str(caught.value).startswith(f"{path}: ")
    assert ("no such file" if damage == "missing" else "does not match its manifest") in str(caught.value)


@pytest.mark.parametrize("version", [FORMAT + 1, 0, None, str(FORMAT)])
def test_another_format_is_refused(run: str, version: Any) -> None:
    uri = checkpoint.save(run, state())
    manifest = storage.read_json(storage.join(uri, "manifest.json"))
    storage.write_json(storage.join(uri, "manifest.json"), manifest | {"format": version})
    with pytest.raises(UsageError, match=f"checkpoint format {version!r}; this version reads {FORMAT}") as caught:
        checkpoint.load(uri)
    assert str(caught.value).startswith(uri)


# -------------------------------------------------------------------------------------------------- a run's checkpoints


def test_checkpoints_are_listed_oldest_first(run: str) -> None:
    assert checkpoint.list_complete(run) == []
    for step in (900, 1000, 20, 100_000_000):
        checkpoint.save(run, state(step))
    assert sorted(map(step_of, checkpoint.list_complete(run))) == [20, 900, 1000, 100_000_000]
    assert list(map(step_of, checkpoint.list_complete(run)))[:3] == [20, 900, 1000]


def test_a_run_stands_for_its_best_checkpoint_then_its_newest(any_run: str) -> None:
    uris = [checkpoint.save(any_run, state(step, seed=step)) for step in (10, 20, 30)]
    assert checkpoint.find(any_run) == uris[2]
    checkpoint.mark_best(any_run, uris[1], 60.25)
    assert checkpoint.find(any_run) == uris[1]
    assert checkpoint.load(any_run).progress.step == 20
    assert checkpoint.find(uris[0]) == uris[0]
    assert storage.read_json(storage.join(any_run, "best.json"))["response_ppl"] == 60.25


def test_a_moved_run_still_finds_its_best(run: str, tmp_path: Path) -> None:
    uris = [checkpoint.save(run, state(step)) for step in (10, 20)]
    checkpoint.mark_best(run, uris[0], 60.25)
    moved = Path(run).rename(tmp_path / "moved")
    assert step_of(checkpoint.find(str(moved))) == 10


@pytest.mark.parametrize("there", [[], ["checkpoints/step-00000001/weights.safetensors"], ["config.json"]])
def test_a_run_without_checkpoint_says_what_to_give(run: str, there: list[str]) -> None:
    for name in there:
        storage.write_bytes(storage.join(run, name), b"{}")
    with pytest.raises(UsageError, match="no complete checkpoint there; give a run's folder") as caught:
        checkpoint.load(run)
    assert str(caught.value).startswith(run)


@pytest.mark.parametrize(
    ("there", "changes", "best"),
    [
        (None, {}, 20),
        (60.25, {}, 20),
        (59.0, {}, 20),
        (58.5, {}, 10),  # the same, marked in time
        (50.0, {}, 10),  # the run was set back to before its best
        (60.25, {"unvalidated": True}, 10),
        (60.25, {"validation": {"response_ppl": 58.75}}, 10),
        (60.25, {"validation": {}}, 10),
        (60.25, {"best_response_ppl": None}, 10),
    ],
)
def test_a_best_that_was_not_marked_in_time_is(
    any_run: str, there: float | None, changes: dict[str, Any], best: int
) -> None:
    before, uri = (checkpoint.save(any_run, state(step)) for step in (10, 20))
    if there is not None:
        checkpoint.mark_best(any_run, before, there)
    progress = TrainProgress(fingerprint="abc", best_response_ppl=58.5, validation={"response_ppl": 58.5})
    checkpoint.restore_best(any_run, uri, replace(progress, **changes))
    assert step_of(storage.read_json(storage.join(any_run, "best.json"))["checkpoint"]) == best


def test_a_validated_checkpoint_is_newer_than_the_same_step_before(run: str) -> None:
    """The first stays whole while the second is written."""
    after = state(10)
    before = replace(after, progress=replace(after.progress, unvalidated=True))
    uris = [checkpoint.save(run, each, attempt=3) for each in (before, after)]
    assert checkpoint.list_complete(run) == uris
    assert checkpoint.newest(run, after=2)[0] == uris[1]
    assert checkpoint.newest(run, after=3) is None
