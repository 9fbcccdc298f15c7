"""Files that several jobs write at the same moment, on a local disk and on a real S3 server."""

import errno
import fcntl
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from filelock import BaseFileLock, FileLock, SoftFileLock
from helpers.empty_store import KEYS, store

from arplus import claims, storage
from arplus.errors import RefusedError, ResourceError


@pytest.fixture(params=["local", "no flock", "s3"])
def file(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_server").uri(f"claims-{uuid4().hex}/file.json"))
    if request.param == "no flock":
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    return str(tmp_path / "folder" / "file.json")


def refuse_locks(*_: object) -> None:
    """As NFS without a lock daemon."""
    raise OSError(errno.ENOLCK, "No locks available")


def append(name: str) -> Callable[[bytes | None], bytes]:
    return lambda data: json.dumps([*json.loads(data or b"[]"), name]).encode()


def test_no_write_of_several_at_once_is_lost(file: str) -> None:
    names = [str(n) for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda name: claims.update(file, append(name)), names))
    assert sorted(json.loads(storage.read_bytes(file))) == sorted(names)


def test_what_a_change_raises_leaves_the_file_and_nothing_beside_it(file: str) -> None:
    claims.update(file, append("a"))

    def refuse(_: bytes | None) -> bytes:
        raise ResourceError("no")

    with pytest.raises(ResourceError):
        claims.update(file, refuse)
    assert storage.read_bytes(file) == b'["a"]'
    assert storage.list_files(file.rpartition("/")[0]) == [file]
    claims.update(file, lambda _: None)
    assert storage.find_bytes(file) is None


@pytest.mark.parametrize("flock", [True, False])
def test_a_lock_that_nobody_gives_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flock: bool) -> None:
    """Of a process that hangs, or of one that was killed on another machine."""
    monkeypatch.setattr(claims, "LOCK_S", 0.3)
    if flock:
        held: BaseFileLock = FileLock(lock := tmp_path / ".file.json.lock")
    else:
        held = SoftFileLock(lock := tmp_path / ".file.json.held")
        monkeypatch.setattr(fcntl, "flock", refuse_locks)
    said = rf"file.json: another process has held its lock for 0.3 s; if no job runs .*, remove {lock}$"
    with held, pytest.raises(ResourceError, match=said):
        claims.update(str(tmp_path / "file.json"), append("a"))
    claims.update(str(tmp_path / "file.json"), append("a"))


def test_a_change_sees_what_another_process_wrote_meanwhile(s3_server: Any) -> None:
    file = s3_server.uri(f"claims-{uuid4().hex}/file.json")
    others = iter(["first", "second"])

    def slow(data: bytes | None) -> bytes:
        for other in others:
            claims.update(file, append(other))
            break
        return append("slow")(data)

    claims.update(file, slow)
    assert json.loads(storage.read_bytes(file)) == ["first", "second", "slow"]


@pytest.mark.processes
def test_a_store_that_never_meets_a_condition_is_not_asked_for_ever(
    aws_settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "LOCK_S", 3.0)
    with store(412, "PreconditionFailed") as (endpoint, asked):
        aws_settings(AWS_ENDPOINT_URL=endpoint, **KEYS)
        with pytest.raises(ResourceError, match=r"^s3://bucket/file.json: was another at each"):
            claims.update("s3://bucket/file.json", append("a"))
    assert 2 < len(asked) < 300, f"{len(asked)} requests: each time after a pause"


@pytest.mark.parametrize(
    ("variable", "value", "kind"),
    [("AWS_ENDPOINT_URL", "http://127.0.0.1:1", ResourceError), ("AWS_SECRET_ACCESS_KEY", "wrong", RefusedError)],
)
def test_a_server_that_is_away_is_told_from_one_that_refuses(
    s3_server: Any, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, kind: type[Exception]
) -> None:
    file = s3_server.uri(f"claims-{uuid4().hex}/file.json")
    monkeypatch.setenv(variable, value)
    with pytest.raises(kind, match=f"^{file}: S3 refused or did not answer; check AWS_ENDPOINT_URL"):
        claims.update(file, append("a"))
