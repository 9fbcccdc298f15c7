"""Who prepares into a folder holds its lease, and nobody else does while that one lives."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest

from arplus import storage
from arplus.errors import UsageError
from arplus.prepare.lease import FILE, Lease, is_unfinished

HOLDER = """
import sys, time
from arplus.prepare.lease import Lease
lease = Lease.take(sys.argv[1])
print("taken", flush=True)
time.sleep(600)
"""


@pytest.fixture(params=["local", "s3"])
def output(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "local":
        return str(tmp_path / "out")
    return str(request.getfixturevalue("s3_server").uri(f"lease-{uuid4().hex}"))


def test_a_second_one_is_refused_by_the_name_of_the_first(output: str) -> None:
    first = Lease.take(output, lifetime=5)
    with pytest.raises(UsageError, match=rf"process {os.getpid()} on .* lasts until 20\d\d-"):
        Lease.take(output)
    first.check()
    first.release(finished=True)
    assert not is_unfinished(output)
    Lease.take(output).release(finished=False)
    assert is_unfinished(output)
    Lease.take(output).release(finished=True)


@pytest.mark.processes
def test_it_is_renewed_while_its_holder_lives(output: str) -> None:
    first = Lease.take(output, lifetime=1.5)
    time.sleep(2.5)
    with pytest.raises(UsageError, match="is preparing a data set there"):
        Lease.take(output)
    first.release(finished=True)


def change(output: str, **changes: Any) -> None:
    """Writes into the lease, as its holder or another job may have."""
    file = storage.join(output, FILE)
    storage.write_bytes(file, json.dumps(storage.read_json(file) | changes).encode())


@pytest.mark.processes
def test_one_that_ran_out_is_taken_and_its_holder_finds_out(output: str) -> None:
    held_up = Lease.take(output, lifetime=4.0)  # renewed every second
    change(output, expires=0.0, process=None)  # as from another machine
    second = Lease.take(output)
    time.sleep(2.0)
    with pytest.raises(UsageError, match=f"process {os.getpid()} on .* took over this output"):
        held_up.check()
    held_up.release(finished=True)
    assert is_unfinished(output), "it removed the lease of another"
    second.check()
    second.release(finished=True)


def test_a_holder_that_slept_past_its_lease_looks_before_it_goes_on(
    output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    slept = Lease.take(output, lifetime=600)
    change(output, token="another", holder="process 1 elsewhere")
    slept.check()
    monkeypatch.setattr("arplus.prepare.lease.time", SimpleNamespace(time=lambda: time.time() + 601))
    with pytest.raises(UsageError, match="process 1 elsewhere took over this output"):
        slept.check()
    slept.release(finished=True)
    assert is_unfinished(output)


@pytest.mark.parametrize("finished", [True, False])
def test_a_holder_that_slept_until_its_successor_had_finished_finds_out(output: str, finished: bool) -> None:
    """Whose files, under the manifest of a whole data set, are others than its own."""
    slept = Lease.take(output, lifetime=600)
    change(output, expires=0.0, process=None)
    Lease.take(output).release(finished=True)
    slept._renew_now()
    with pytest.raises(UsageError, match=r"another job, which has ended, took over this output"):
        slept.check()
    slept.release(finished=finished)
    assert not is_unfinished(output), "the lease came back, and marks a whole data set as unfinished"


def test_a_holder_that_never_looked_again_leaves_its_successors_lease(output: str) -> None:
    slept = Lease.take(output, lifetime=600)
    change(output, token="another")
    slept.release(finished=True)
    assert is_unfinished(output)


def test_an_output_by_its_file_uri_has_its_lease_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    output = (tmp_path / "out").as_uri()
    lease = Lease.take(output)
    assert is_unfinished(output)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    lease.release(finished=True)
    assert not is_unfinished(output)


def test_exactly_one_of_many_wins(output: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    def attempt(_: int) -> Lease | None:
        try:
            return Lease.take(output)
        except UsageError:
            return None

    for expired in (False, True):
        with ThreadPoolExecutor(8) as threads:
            winners = [lease for lease in threads.map(attempt, range(8)) if lease]
        assert len(winners) == 1, expired
        winners[0].release(finished=False)


def test_that_of_a_killed_process_on_this_machine_is_free_at_once(output: str) -> None:
    command: list[Any] = [sys.executable, "-c", HOLDER, output]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "taken\n"
        with pytest.raises(UsageError, match=f"process {process.pid} on"):
            Lease.take(output)
        process.send_signal(signal.SIGKILL)
        process.wait()
    Lease.take(output).release(finished=True)


def test_a_lease_cut_short_is_free(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(json.dumps({"holder": "x"})[:5])
    Lease.take(str(tmp_path)).release(finished=True)


@pytest.mark.parametrize("name", ["a#b", "a?b=c", "100% +成都"])
def test_on_s3_it_lies_in_the_output_whatever_its_name(s3_server: Any, name: str) -> None:
    output = s3_server.uri(f"{uuid4().hex}/{name}/data")
    lease = Lease.take(output)
    assert is_unfinished(output)
    lease.release(finished=True)
    assert not is_unfinished(output)
