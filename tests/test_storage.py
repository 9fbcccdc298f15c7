"""Files here and on S3 by their URIs: whole or not there, and errors in the user's words."""

import errno
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from helpers.answers import Answers, serving
from pyarrow import fs

from arplus import storage
from arplus.data.dataset import Dataset
from arplus.errors import ArplusError, RefusedError, ResourceError, UsageError
from arplus.runs.attempt import SupersededError


@pytest.fixture(params=["local", "s3"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder of its own for every test, here and on the S3 server."""
    if request.param == "local":
        return str(tmp_path / "folder")
    return request.getfixturevalue("s3_server").uri(f"storage/{tmp_path.name}")


# ------------------------------------------------------------------------------------------------ local and S3 alike


def test_what_is_written_is_read(folder: str) -> None:
    uri = storage.join(folder, "a", "文件 one.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    assert storage.exists(uri)
    assert storage.exists(folder)
    assert storage.read_bytes(uri) == b"first"
    storage.write_bytes(uri, b"")
    assert storage.read_bytes(uri) == b""


def test_asking_whether_a_file_can_be_written_writes_nothing(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "old"), b"old")
    storage.check_writable(storage.join(folder, "old"))
    storage.check_writable(storage.join(folder, "new"))
    assert storage.list_files(folder) == [storage.join(folder, "old")]
    assert storage.read_bytes(storage.join(folder, "old")) == b"old"
    with pytest.raises(UsageError, match=f"^{folder}: is a folder; name a file$"):
        storage.check_writable(folder)


def test_megabytes_survive(folder: str) -> None:
    data = os.urandom(12 << 20)  # more than one part of an S3 upload
    storage.write_bytes(storage.join(folder, "large"), data)
    assert storage.read_bytes(storage.join(folder, "large")) == data


def test_json_round_trip(folder: str) -> None:
    value = {"四川": [1, 2.5, None, "成都"], "b": {"c": True}}
    uri = storage.join(folder, "x.json")
    assert storage.find_bytes(uri) is None
    storage.write_json(uri, value)
    assert storage.read_json(uri) == storage.parse_json(storage.find_bytes(uri) or b"", uri) == value
    assert "四川" in storage.read_bytes(uri).decode()


def test_files_are_listed_in_the_order_of_their_names(folder: str) -> None:
    names = ["b/2", "b/10", "a", "c", "b/sub/x", "ab"]
    for name in names:
        storage.write_bytes(storage.join(folder, name), b"x")
    expected = [storage.join(folder, name) for name in ["a", "ab", "b/10", "b/2", "b/sub/x", "c"]]
    assert storage.list_files(folder) == expected
    assert storage.list_files(folder + "/") == expected
    assert storage.list_files(expected[1]) == [expected[1]]
    assert [storage.read_bytes(uri) for uri in expected] == [b"x"] * len(expected)


def test_delete_takes_a_file_a_folder_or_nothing(folder: str) -> None:
    for name in ("keep", "one", "many/a", "many/b/c", "many-more"):
        storage.write_bytes(storage.join(folder, name), b"x")
    storage.delete(storage.join(folder, "one"))
    storage.delete(storage.join(folder, "many"))
    storage.delete(storage.join(folder, "never was"))
    assert storage.list_files(folder) == [storage.join(folder, "keep"), storage.join(folder, "many-more")]
    assert not storage.exists(storage.join(folder, "many"))


def test_errors_name_the_uri(folder: str) -> None:
    missing, broken = storage.join(folder, "missing"), storage.join(folder, "broken.json")
    storage.write_bytes(broken, b'{"a": ')
    with pytest.raises(UsageError, match=f"^{missing}: no such file$"):
        storage.read_bytes(missing)
    with pytest.raises(UsageError, match=f"^{missing}: no such file or folder$"):
        storage.list_files(missing)
    with pytest.raises(UsageError, match=f"^{missing}: no such file$"):
        storage.read_json(missing)
    with pytest.raises(UsageError, match=f"^{broken}: not valid JSON"):
        storage.read_json(broken)


def test_a_folder_is_not_read_as_a_file(folder: str) -> None:
    storage.write_bytes(storage.join(folder, "file"), b"")
    with pytest.raises(UsageError, match=f"^{folder}: "):
        storage.read_bytes(folder)


# ------------------------------------------------------------------------------------------------------------- local


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that a failing write must leave as it is."""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    yield path
    assert [p.name for p in tmp_path.iterdir()] == ["file"], "a temporary file is left"
    assert path.read_bytes() == b"old"


def test_a_write_that_dies_leaves_the_old_file(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(str(old), b"new and longer")


def test_a_full_disk_is_a_lack_of_resources(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResourceError, match=f"^{old}: No space left on device$"):
        storage.write_bytes(str(old), b"new and longer")


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    contents = [b"a" * 300_000, b"b" * 200_000]
    storage.write_bytes(uri, contents[0])

    def write() -> None:
        for i in range(40):
            storage.write_bytes(uri, contents[i % 2])

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert storage.read_bytes(uri) in contents
    writer.join()


def test_a_file_in_the_place_of_a_folder_is_the_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    uri = str(tmp_path / "file" / "below")
    with pytest.raises(UsageError, match=f"^{uri}: "):
        storage.write_bytes(uri, b"")
    with pytest.raises(UsageError, match=f"^{uri}: "):
        storage.read_bytes(uri)


# ---------------------------------------------------------------------------------------------------------------- S3


def test_s3_is_the_server_of_the_environment(s3_server: Any) -> None:
    filesystem, path = storage.resolve(s3_server.uri("a/b/"))
    assert isinstance(filesystem, fs.S3FileSystem)
    assert path == f"{s3_server.bucket}/a/b"
    assert filesystem.region == "us-east-1"


def test_what_is_kept_for_long_holds_no_keys_and_serves_ray(s3_server: Any, tmp_path: Path) -> None:
    from ray.train.v2._internal.execution.storage import StorageContext

    filesystem, path = storage.resolve_lasting(s3_server.uri(f"lasting-{uuid4().hex}"))
    kept = pickle.dumps(filesystem)
    assert s3_server.environment["AWS_SECRET_ACCESS_KEY"].encode() not in kept
    StorageContext(path, "job", storage_filesystem=pickle.loads(kept))  # writes a marker
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a").write_bytes(b"1")
    fs.copy_files(str(tmp_path / "here"), f"{path}/there", destination_filesystem=filesystem)
    uri = f"s3://{path}"
    assert storage.list_files(uri) == [f"{uri}/job/.validate_storage_marker", f"{uri}/there/a"]
    filesystem.delete_dir(f"{path}/job")
    filesystem.delete_file(f"{path}/there/a")
    assert not storage.exists(f"{uri}/job")


def check_refused(uri: str, expected: type[ArplusError]) -> None:
    """Every call says so, in 15 seconds; all at once, for most of that is waiting."""
    calls = (
        lambda: storage.exists(uri),
        lambda: storage.read_bytes(uri),
        lambda: storage.write_bytes(uri, b"new"),
        lambda: storage.list_files(uri),
        lambda: storage.delete(uri),
    )
    with ThreadPoolExecutor(len(calls)) as threads:
        answers = [threads.submit(call) for call in calls]
        assert not wait(answers, timeout=15).not_done
        for answer in answers:
            with pytest.raises(ArplusError, match=f"^{uri}: ") as caught:
                answer.result()
            assert type(caught.value) is expected
            for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
                assert name in str(caught.value)
            assert os.environ.get("AWS_SECRET_ACCESS_KEY", "wrong-") not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"])
def test_wrong_credentials_are_the_users_error(s3_server: Any, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    uri = s3_server.uri("guarded")
    storage.write_bytes(uri, b"old")
    with monkeypatch.context() as wrong:
        wrong.setenv(name, f"wrong-{name.lower()}")
        check_refused(uri, RefusedError)
        with pytest.raises(RefusedError, match="AWS_SECRET_ACCESS_KEY"):
            Dataset.open(s3_server.uri("some-data-set"))
    assert storage.read_bytes(uri) == b"old"


def test_no_credentials_are_the_users_error(s3_server: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.aws/credentials either
    for name in ("AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
        monkeypatch.delenv(name)
    check_refused(s3_server.uri("guarded"), RefusedError)


def test_a_server_that_does_not_answer_is_a_lack_of_resources(s3_server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    check_refused(s3_server.uri("unreachable"), ResourceError)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("status", "expected"), [(500, ResourceError), (503, ResourceError), (403, RefusedError), (400, RefusedError)]
)
def test_a_server_in_trouble_is_told_from_one_that_refuses(
    monkeypatch: pytest.MonkeyPatch, status: int, expected: type[ArplusError]
) -> None:
    class Troubled(Answers):
        def answer(self) -> None:
            self.say(status)

    with serving(Troubled) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, f"some-{name.lower()}")
        check_refused("s3://bucket/key", expected)


# ---------------------------------------------------------------------------------------------------------- patience


class Clock:
    """Time that passes only where it is slept away."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(storage, "time", clock)
    return clock


def failing(*errors: Exception) -> Callable[[], str]:
    """Work that fails so, one call after the other, and then succeeds."""
    left = iter(errors)

    def work() -> str:
        for error in left:
            raise error
        return "done"

    return work


def test_s3_may_be_away_or_refuse_for_a_while(clock: Clock) -> None:
    work = failing(ResourceError("away"), RefusedError("too often"), ResourceError("away"))
    assert storage.with_retries("s3://bucket/run", work) == "done"
    assert clock.slept == [0.5, 1.0, 2.0]


@pytest.mark.parametrize(
    ("error", "patience"),
    [(ResourceError("x"), storage.PATIENCE_S), (RefusedError("x"), storage.PATIENCE_WITH_REFUSALS_S)],
)
def test_patience_ends(clock: Clock, error: ArplusError, patience: float) -> None:
    with pytest.raises(type(error)):
        storage.with_retries("s3://bucket/run", failing(*[error] * 1000))
    assert 0.7 * patience < clock.now <= patience
    assert max(clock.slept) == 15


@pytest.mark.parametrize(
    ("uri", "error"),
    [
        ("s3://bucket/run", UsageError("s3://bucket/run: no such file")),
        ("/a/disk", ResourceError("full")),
        ("s3://bucket/run", SupersededError("another job's now")),
    ],
)
def test_what_does_not_pass_is_not_waited_for(clock: Clock, uri: str, error: Exception) -> None:
    with pytest.raises(type(error)):
        storage.with_retries(uri, failing(error))
    assert clock.slept == []
