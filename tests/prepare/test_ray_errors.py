"""The preparation disturbed: killed, raced, refused, without disk or server, and fed with every nasty line."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from arplus import claims, storage
from arplus.config import PrepareConfig, SynthesizeConfig
from arplus.data.manifest import Manifest
from arplus.errors import RefusedError, ResourceError, UsageError
from arplus.prepare import tasks
from arplus.prepare.lease import FILE, Lease
from arplus.prepare.pipeline import prepare
from arplus.synthetic.write import synthesize

pytestmark = pytest.mark.usefixtures("ray_cluster")

ROOT = Path(__file__).parent.parent.parent
DRIVER = """
import sys
from arplus.cluster import connection
from arplus.config import PrepareConfig
from arplus.prepare.pipeline import prepare
connection.connect()
prepare(PrepareConfig(input=sys.argv[1], output=sys.argv[2], valid=0.02, test=0.02), block_bytes=200_000)
"""


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, generator: None) -> Path:
    path = tmp_path_factory.mktemp("records") / "all.jsonl.gz"
    synthesize(SynthesizeConfig(output=str(path), records=6000, duplicates=200, broken=20))
    return path


def settings(source: Any, output: Any) -> PrepareConfig:
    return PrepareConfig(input=str(source), output=str(output), valid=0.02, test=0.02)


@pytest.fixture(scope="module")
def undisturbed(records: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare(settings(records, tmp_path_factory.mktemp("undisturbed") / "out"), block_bytes=200_000)


def start(records: Path, output: Path) -> subprocess.Popen[bytes]:
    """A preparation in a process of its own, on this session's cluster."""
    import ray

    address = {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(records), str(output)], cwd=ROOT, env=os.environ | address
    )


def has(pattern: str) -> Callable[[Path], bool]:
    return lambda output: any(output.glob(pattern))


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param(has("_lease.json"), id="claimed", marks=pytest.mark.soak),
        pytest.param(has("_temporary/*/*.arrow"), id="parsing", marks=pytest.mark.soak),
        pytest.param(has("*/*.parquet"), id="writing"),
        pytest.param(has("vocabulary/characters.txt"), id="committing", marks=pytest.mark.soak),
    ],
)
def test_killed_at_any_stage_and_run_again(
    tmp_path: Path, records: Path, undisturbed: Manifest, moment: Callable[[Path], bool]
) -> None:
    output = tmp_path / "out"
    process = start(records, output)
    deadline = time.monotonic() + 120
    while not moment(output):
        assert process.poll() is None, "it ended before the moment came"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # A kill in the last moment can come too late: then the set is whole, and says so.
    if not (output / "manifest.json").exists():
        prepare(settings(records, output), block_bytes=300_000)
    manifest = Manifest.read(str(output))
    assert manifest.fingerprint == undisturbed.fingerprint
    there = {f"{f.parent.name}/{f.name}" for f in output.rglob("*.parquet")}
    assert there == {file.path for split in manifest.splits.values() for file in split.files}
    assert not list(output.glob("_temporary/**/*.arrow"))


def test_a_second_job_on_the_same_output_is_refused(tmp_path: Path, records: Path) -> None:
    output = str(tmp_path / "out")
    lease = Lease.take(output)
    before = {str(path) for path in tmp_path.rglob("*")}
    with pytest.raises(UsageError, match=rf"{output}: process {os.getpid()} on .* is preparing a data set there"):
        prepare(settings(records, output))
    assert {str(path) for path in tmp_path.rglob("*")} == before
    lease.release(finished=False)
    assert prepare(settings(records, output)).sessions


def test_a_job_that_lost_its_lease_commits_nothing(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another job wrote its own while this one was held up for longer than the lease lasts."""
    take, encode = Lease.take, tasks.count.remote
    monkeypatch.setattr(Lease, "take", lambda output: take(output, lifetime=0.4))
    other = json.dumps({"token": "other", "holder": "process 7 on elsewhere"}).encode()

    def lose(*arguments: Any) -> Any:
        claims.update(str(tmp_path / "out" / FILE), lambda _: other)
        time.sleep(0.5)
        return encode(*arguments)

    monkeypatch.setattr(tasks.count, "remote", lose)
    with pytest.raises(UsageError, match="process 7 on elsewhere took over"):
        prepare(settings(records, tmp_path / "out"))
    assert not (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.parametrize("kind", [UsageError, ResourceError])
def test_what_a_task_fails_with_is_told_without_rays_words(
    tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    import ray

    @ray.remote
    def fail() -> None:
        raise kind("the storage: no answer")

    monkeypatch.setattr(tasks.count, "remote", lambda *arguments: fail.remote())
    with pytest.raises(kind, match=r"^the storage: no answer$"):
        prepare(settings(records, tmp_path / "out"))


def test_wrong_credentials_and_missing_buckets_are_told_at_once(
    s3_server: Any, records: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = s3_server.uri("faults/all.jsonl.gz")
    storage.write_bytes(source, records.read_bytes())
    began = time.monotonic()
    with pytest.raises(UsageError, match=r"s3://no-such-bucket/in"):
        prepare(settings("s3://no-such-bucket/in", s3_server.uri("faults/a")))
    with pytest.raises(RefusedError, match=r"s3://no-such-bucket/out"):
        prepare(settings(source, "s3://no-such-bucket/out"))
    assert time.monotonic() - began < 15
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    for where in (settings(source, s3_server.uri("faults/b")), settings(records, s3_server.uri("faults/c"))):
        began = time.monotonic()
        with pytest.raises(RefusedError, match=r"s3://tests/faults/.*AWS_SECRET_ACCESS_KEY"):
            prepare(where)
        assert time.monotonic() - began < 15


NESTED = b'{"dialog": ' + b"[" * 5000 + b"]" * 5000 + b"}"


def nasty(good: bytes) -> tuple[list[bytes], Counter[str]]:
    """10,000 broken lines of every kind, and the reasons they are to be rejected for."""
    record = json.loads(good)
    broken: list[tuple[bytes, str]] = [
        (good[:11], "invalid_json"),
        (good + good, "invalid_json"),
        (good.replace(b"dialog", b"dia\x00log"), "invalid_json"),
        (good.replace(b'[["', b'[["\\ud800'), "lone_surrogate"),
        (good.replace(b'[["', b'[["\xff'), "invalid_utf8"),
        (NESTED, "invalid_json"),
        (b"\x00" * 100, "invalid_json"),
        (b"null", "not_an_object"),
        (json.dumps({**record, "dialog": []}).encode(), "empty_dialogue"),
        (json.dumps({**record, "dialog": [[1], [2]]}).encode(), "utterance"),
        (json.dumps({**record, "dialog": None}).encode(), "dialog"),
        (json.dumps({**record, "profile": 7}).encode(), "profile"),
        (json.dumps({**record, "uid": [99] * len(record["dialog"])}).encode(), "uid_out_of_range"),
        (json.dumps({**record, "uid": [0]}).encode(), "uid_length"),
        (json.dumps({**record, "uid": ["0"] * len(record["dialog"])}).encode(), "uid"),
        (json.dumps({**record, "golden_response": 1}).encode(), "golden_response"),
        (json.dumps({**record, "profile": [{"gender": "x", "loc": "", "tag": ""}] * 9}).encode(), "gender"),
        (json.dumps({**record, "profile": [{"gender": "", "loc": 1, "tag": ""}] * 9}).encode(), "loc"),
        (json.dumps({**record, "profile": [{"gender": "", "loc": "", "tag": 1}] * 9}).encode(), "tag"),
        (b"{}", "dialog"),
    ]
    lines = [broken[i % len(broken)] for i in range(10_000)]
    return [line for line, _ in lines], Counter(reason for _, reason in lines)


def test_every_nasty_line_is_a_counted_reject_or_a_session(tmp_path: Path, records: Path) -> None:
    kept = [line for line in gzip.decompress(records.read_bytes()).splitlines() if len(line) > 100][:2000]
    good = next(line for line in kept if b"uid" in line and line.endswith(b"}") and b'"dialog": [["' in line)
    record = json.loads(good)
    turns = len(record["dialog"])
    valid = [
        {**record, "dialog": [["长" * 100_000]] * turns},
        {**record, "dialog": [["a\0b\u0001c"]] * turns},
        {**record, "dialog": [["大" * (17 << 20)], *[["x"]] * (turns - 1)]},  # a record of 50 MB
        {**record, "dialog": [[""]] * turns},
    ]
    lines, reasons = nasty(good)
    big = b'{"dialog": "' + b"x" * (70 << 20) + b'"}'
    lines += [json.dumps(item, ensure_ascii=False).encode() for item in valid] + [big] + [b"", b" \t ", b"\r"]
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(b"\n".join(lines), 1))
    config = PrepareConfig(
        input=str(tmp_path / "in.jsonl.gz"), output=str(tmp_path / "out"), max_reject_share=1, valid=0, test=0
    )
    manifest = prepare(config)
    reasons["line_too_long"] += 1
    assert manifest.rejected == dict(reasons)
    assert manifest.records == 10_005
    assert (manifest.sessions, manifest.blank_lines) == (4, 3)
    numbers: list[int] = []
    found: Counter[str] = Counter()
    for path in (tmp_path / "out" / "rejects").iterdir():
        for line in gzip.decompress(path.read_bytes()).splitlines():
            reject = json.loads(line)
            numbers.append(reject["line"])
            found[reject["reason"]] += 1
            if reject["reason"] == "line_too_long":
                assert len(reject["raw"]) + reject["bytes_left_out"] == len(big)
    assert found == reasons
    assert sorted(numbers) == [*range(1, 10_001), 10_005]


def test_a_full_disk_is_told_plainly(tmp_path: Path, records: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system of 1 MiB; needs root (or another right to mount), as in a container."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small file system here: {mounted.stderr.decode().strip()}")
    try:
        with pytest.raises(ResourceError, match=rf"{small}.*[Nn]o space left"):
            prepare(settings(records, small / "out"))
        assert not (small / "out" / "manifest.json").exists()
        assert not list(small.rglob("*.arrow")), "what was staged is removed"
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_s3_in_and_out_while_the_server_is_killed_and_restarted(
    request: pytest.FixtureRequest, s3_server: Any, records: Path, undisturbed: Manifest
) -> None:
    source, output = s3_server.uri("away/all.jsonl.gz"), s3_server.uri("away/out")
    storage.write_bytes(source, records.read_bytes())
    # A cluster of its own: the workers of this session's one may know nothing of the server.
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen([sys.executable, "-c", DRIVER, source, output], cwd=ROOT, env=environment)
    deadline = time.monotonic() + 120
    while not any("_temporary" in name for name in _listed(output)):
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (server,) = (process for process in psutil.Process().children() if "weed" in process.name())
    command, folder, variables = server.cmdline(), server.cwd(), server.environ()
    server.kill()
    server.wait()
    time.sleep(3)
    restarted = subprocess.Popen(
        command, cwd=folder, env=variables, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
    )
    request.session.addfinalizer(restarted.kill)
    assert job.wait(200) == 0
    manifest = Manifest.read(output)
    assert manifest.fingerprint == undisturbed.fingerprint
    names = {name.removeprefix(output + "/").split("/")[0] for name in storage.list_files(output)}
    splits = {split for split, facts in manifest.splits.items() if facts.files}
    assert names == {"manifest.json", "data_card.json", "data_card.html", "vocabulary", "rejects", *splits}
    with pytest.raises(UsageError, match="holds a prepared data set"):
        prepare(settings(source, output))


def _listed(uri: str) -> list[str]:
    try:
        return storage.list_files(uri) if storage.exists(uri) else []
    except UsageError:
        return []
