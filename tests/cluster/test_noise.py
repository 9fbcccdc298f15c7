"""Ray's remark on its own actors is not shown, whoever makes it; an error of Ray's that is one is."""

import os
import subprocess
import sys

import pytest
import ray
from helpers.faults import own_processes

from arplus.cluster import noise

JOB = """
import os, time
import ray
from arplus.cluster import connection
connection.connect()

class Holder:
    def __init__(self, value): self.value = value
    def hold(self): return ray.get(self.value[0] if isinstance(self.value, list) else self.value)

def make():
    held = ray.put(b"")
    return ray.get(ray.remote(num_cpus=0, max_restarts=1)(Holder).remote([held]).hold.remote())

@ray.remote(num_cpus=0)
def in_a_worker():
    make()
    os.write(2, b"Failed to send resource request for train-1.\\nTraceback (most recent call last):\\n")
    os.write(2, b'  File "client.py", line 58, in send\\nray.exceptions.GetTimeoutError: not ready\\n\\tpid: 7\\n')
    os.write(2, b"Unhandled error: ray::_StatsActor.update_execution_metrics() (pid=1)\\n")
    os.write(2, b"  File 'stats.py', line 934, in update_dataset\\nKeyError: 'dataset_1_0'\\n")
    os.write(2, b"[2026-01-01 00:00:00,000 E 1 1] core_worker.cc:1: forwarded\\n")

make()
os.write(2, b"[2026-01-01 00:00:00,000 E 1 1] core_worker.cc:1: own\\n")
ray.get(in_a_worker.remote())
time.sleep(1.5)  # for what is forwarded
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_harmless_remark_is_left_out_and_an_error_is_not() -> None:
    environment = os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    done = subprocess.run([sys.executable, "-c", JOB], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert noise.HARMLESS not in done.stdout + done.stderr
    assert "core_worker.cc:1: own" in done.stderr
    assert "core_worker.cc:1: forwarded" in done.stderr
    assert "Failed to send resource request" in done.stderr
    assert not any(
        word in done.stdout + done.stderr
        for word in ("Traceback", "client.py", "GetTimeoutError", "pid: 7", "StatsActor", "stats.py", "KeyError")
    )


@pytest.mark.usefixtures("ray_cluster")
def test_ctrl_c_reaches_the_job_alone() -> None:
    """The terminal tells all of a job's group; of Ray's processes some would die before the job has saved."""
    own = [process.pid for process in own_processes("ray")]
    assert len(own) > 3
    assert os.getpgrp() not in {os.getpgid(pid) for pid in own}


def test_what_else_is_written_meanwhile_is_shown(capfd: pytest.CaptureFixture[str]) -> None:
    with noise.without_harmless():
        os.write(2, f"E 1 actor {noise.HARMLESS}\nE 2 another error\n".encode())
    assert capfd.readouterr().err == "E 2 another error\n"
