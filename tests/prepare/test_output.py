"""A preparation deletes what is its own, or was left by one that died; never its successor's work or a user's file."""

import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers.prepared import make_manifest

from arplus.data.manifest import DataFile, SplitFacts
from arplus.errors import UsageError
from arplus.prepare import output, statistics
from arplus.prepare.card import DataCard
from arplus.prepare.lease import FILE, LIFETIME, Lease
from arplus.text import Vocabulary

WORDS = Vocabulary(["a"])


def write(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A lease that was lost, with files of its holder and of the successor."""
    lease = Lease.take(str(tmp_path))
    file = tmp_path / FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"expires": 0.0, "process": None}))
    successor = Lease.take(str(tmp_path))
    monkeypatch.setattr("arplus.prepare.lease.time", SimpleNamespace(time=lambda: time.time() + 2 * LIFETIME))
    with pytest.raises(UsageError, match="took over"):
        lease.check()
    monkeypatch.undo()
    for token in (lease.token, successor.token):
        write(tmp_path, f"_temporary/{token}/0.arrow", f"train/part-00000-{token}.parquet")
    yield lease
    successor.check()
    successor.release(finished=True)


def test_who_lost_the_lease_deletes_nothing(tmp_path: Path, lost: Lease) -> None:
    before = files(tmp_path)
    file = DataFile(path=f"train/part-00000-{lost.token}.parquet", rows=1, row_groups=[1], digest="")
    manifest = make_manifest({"train": SplitFacts(sessions=1, examples=1, files=[file])})
    card = DataCard(manifest=manifest, histograms=statistics.empty(), vocabulary={})
    with pytest.raises(UsageError, match="took over this output"):
        output.commit(str(tmp_path), lost, manifest, card, WORDS, WORDS)
    output.leave(str(tmp_path), lost, finished=False)
    assert files(tmp_path) == before


def test_who_fails_deletes_its_own_staging_alone(tmp_path: Path) -> None:
    lease = output.claim(str(tmp_path))
    write(tmp_path, f"_temporary/{lease.token}/0.arrow", "_temporary/0a1b2c3d/0.arrow")
    output.leave(str(tmp_path), lease, finished=False)
    assert files(tmp_path) == {FILE, "_temporary/0a1b2c3d/0.arrow"}


def test_what_another_preparation_left_goes_whatever_its_sets_and_a_users_files_stay(tmp_path: Path) -> None:
    output.leave(str(tmp_path), output.claim(str(tmp_path)), finished=False)
    foreign = {"notes.txt", "train/notes.txt", "mine/part-00000.parquet", "mine/deep/part-00000-0a1b2c3d.parquet"}
    left = {
        "train/part-00000-0a1b2c3d.parquet",
        "official/part-00001-0a1b2c3d.parquet",
        "official/.part-00002-0a1b2c3d.parquet.4e5f6a7b.tmp",
        "vocabulary/characters.txt",
        "rejects/000000-000000000000-0a1b2c3d.jsonl.gz",
        "_temporary/0a1b2c3d/000000-000000000000.arrow",
        "data_card.json",
    }
    write(tmp_path, *foreign, *left)
    lease = output.claim(str(tmp_path))
    assert files(tmp_path) == foreign | {FILE}
    assert not (tmp_path / "official").exists()
    output.leave(str(tmp_path), lease, finished=False)


def test_a_kill_while_the_lease_was_written_keeps_nobody_out(tmp_path: Path) -> None:
    left = [f".{FILE}.lock", f".{FILE}.0a1b2c3d.tmp"]
    write(tmp_path, *left)
    output.leave(str(tmp_path), output.claim(str(tmp_path)), finished=True)
    assert files(tmp_path) == set()
    write(tmp_path, *left, "a user's file")
    with pytest.raises(UsageError, match="is not empty"):
        output.claim(str(tmp_path))
    assert files(tmp_path) == {*left, "a user's file"}
