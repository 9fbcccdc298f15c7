"""How a job joins the cluster that RAY_ADDRESS names, or says in seconds why it cannot."""

import json
import os
import subprocess
import sys
import time

import pytest
import ray

JOIN = """
import ray
from arplus import cli
from arplus.cluster import connection
cli.run(connection.connect)
print(ray.cluster_resources()["CPU"])
"""


def connect(address: str) -> subprocess.CompletedProcess[str]:
    """A process that joins the cluster as the jobs do, and prints what it found."""
    environment = os.environ | {"RAY_ADDRESS": address}
    return subprocess.run([sys.executable, "-c", JOIN], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.usefixtures("ray_cluster")
def test_a_running_cluster_is_joined() -> None:
    address = ray.get_runtime_context().gcs_address
    for same in (address, f"127.0.0.1:{address.rpartition(':')[2]}"):
        done = connect(same)
        assert (done.returncode, done.stdout) == (0, "2.0\n"), done.stderr


@pytest.mark.usefixtures("ray_cluster")
def test_workers_know_the_address_of_a_cluster_of_ones_own_without_a_runtime_env() -> None:
    """With one, Ray would use none of the workers that it starts with the cluster."""
    known = ray.remote(num_cpus=0)(lambda: (os.environ["RAY_ADDRESS"], ray.get_runtime_context().runtime_env.to_dict()))
    address, environment = ray.get(known.remote())
    assert address.rpartition(":")[2] == ray.get_runtime_context().gcs_address.rpartition(":")[2]
    assert environment == {}
    assert os.environ.get("RAY_ADDRESS") != address, "for this process may end it and start another one"


TOO_LONG = "/tmp/" + 80 * "x"
WRONG = {
    "RAY_ADDRESS=127.0.0.1:1": (3, "no cluster answers there"),
    "RAY_ADDRESS=no-such-host.invalid:6379": (3, "no cluster answers there"),
    "RAY_ADDRESS=127.0.0.1:90000": (3, "no cluster answers there"),
    "RAY_ADDRESS=head": (2, "must be HOST:PORT"),
    "RAY_ADDRESS=ray://me:hunter2@head:10001": (2, "must be HOST:PORT"),
    "RAY_ADDRESS=http://127.0.0.1:8265": (2, "submit the job with `ray job submit`"),
    f"RAY_TMPDIR={TOO_LONG}": (2, "has 85 bytes"),
    "RAY_TMPDIR=/proc/none": (2, "No such file or directory"),
}
ASK = """
import os, sys
from arplus import cli
from arplus.cluster import connection
connection.ANSWER_S = 1.0
codes = []
for said in sys.argv[1:]:
    name, _, value = said.partition("=")
    os.environ[name] = value
    try:
        cli.run(connection.connect)
    except SystemExit as end:
        codes.append(end.code)
    del os.environ[name]
print(codes)
"""


@pytest.mark.processes
def test_what_ray_would_hang_at_is_said_in_a_line_and_in_seconds() -> None:
    """Wrong addresses, and a folder whose name is too long for sockets."""
    start = time.monotonic()
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-c", ASK, *WRONG]
    done = subprocess.run(command, env=plain, capture_output=True, text=True, timeout=120)
    assert time.monotonic() - start < 60
    assert json.loads(done.stdout) == [code for code, _ in WRONG.values()], done.stderr
    for said, (wrong, (_, message)) in zip(done.stderr.splitlines(), WRONG.items(), strict=True):
        assert said.startswith(f"error: {wrong.replace('me:hunter2', '***')}: ")
        assert message in said


@pytest.mark.processes
def test_a_ray_that_does_not_start_is_said_in_a_line() -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"RAY_OVERRIDE_RESOURCES": "{"}
    done = subprocess.run([sys.executable, "-c", JOIN], env=plain, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert "error: Ray does not start (Expecting property name" in done.stderr.splitlines()[-1]
