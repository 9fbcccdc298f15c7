"""How a job joins the cluster that RAY_ADDRESS names, or says in seconds why it cannot."""

import os
import subprocess
import sys
import time

import pytest
import ray

from arplus.cluster import connection
from arplus.errors import UsageError


def connect(address: str) -> subprocess.CompletedProcess[str]:
    """A process that joins the cluster as the jobs do, and prints what it found."""
    script = (
        "import ray\nfrom arplus import cli, cluster\ncli.run(cluster.connect)\nprint(ray.cluster_resources()['CPU'])"
    )
    environment = os.environ | {"RAY_ADDRESS": address}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_cluster_is_joined() -> None:
    address = ray.get_runtime_context().gcs_address
    for same in (address, f"127.0.0.1:{address.rpartition(':')[2]}"):
        done = connect(same)
        assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr


@pytest.mark.parametrize(
    ("address", "code", "message"),
    [
        ("127.0.0.1:1", 3, "error: RAY_ADDRESS=127.0.0.1:1: no cluster answers there"),
        ("no-such-host.invalid:6379", 3, "error: RAY_ADDRESS=no-such-host.invalid:6379: no cluster answers there"),
        ("127.0.0.1:90000", 3, "error: RAY_ADDRESS=127.0.0.1:90000: no cluster answers there"),
        ("head", 2, "error: RAY_ADDRESS=head: must be HOST:PORT"),
        ("ray://me:hunter2@head:10001", 2, "error: RAY_ADDRESS=ray://***@head:10001: must be HOST:PORT"),
        ("http://127.0.0.1:8265", 2, "submit the job with `ray job submit`"),
    ],
)
def test_a_wrong_address_is_said_in_seconds(address: str, code: int, message: str) -> None:
    start = time.monotonic()
    done = connect(address)
    assert time.monotonic() - start < 60
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_a_long_temporary_folder_is_refused_before_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp/" + 80 * "x")
    with pytest.raises(UsageError, match=r"RAY_TMPDIR=.*has 85 bytes"):
        connection._check_sockets()
