"""Fifty trackers in eight processes against a real MLflow server: no lock, no loss. About two minutes a database."""

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from arplus.tracking import RunRef, Tracker, start_run
from arplus.tracking.client import connect

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]

CLIENTS, PROCESSES = 50, 8
STEPS, METRICS = 100, 6


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def running(command: list[Any], log: Path, **options: Any) -> Iterator[None]:
    """A server of ours, ended with all its processes."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=file, stderr=file, start_new_session=True, **options
        )
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(20)


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL of ours on loopback, with trust for whoever is on this machine, as a user who is not root."""
    programs = Path(shutil.which("initdb") or pytest.skip("PostgreSQL's initdb is not installed")).resolve().parent
    as_user: dict[str, Any] = {}
    if os.geteuid() == 0:
        as_user = {"user": "nobody", "group": "nogroup"}  # PostgreSQL refuses to run as root
    folder.chmod(0o777)
    for parent in folder.parents[:3]:
        parent.chmod(parent.stat().st_mode | 0o011)
    port = free_port()
    subprocess.run([programs / "initdb", "-D", folder / "pg", "-A", "trust", "-U", "tests"],
                   check=True, stdout=subprocess.DEVNULL, **as_user)  # fmt: skip
    command = [
        programs / "postgres",
        "-D",
        folder / "pg",
        "-h",
        "127.0.0.1",
        "-p",
        port,
        "-k",
        folder,
        "-c",
        "fsync=off",
    ]
    with running(command, folder.parent / "pg.log", **as_user):
        ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
        deadline = time.monotonic() + 60
        while subprocess.run(ready, check=False).returncode:
            assert time.monotonic() < deadline, (folder.parent / "pg.log").read_text()
            time.sleep(0.2)
        yield f"postgresql+psycopg2://tests@127.0.0.1:{port}/postgres"


@contextmanager
def mlflow(database: str, folder: Path) -> Iterator[str]:
    """The MLflow server on a database."""
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", port, "--workers", "1"]
    command += ["--backend-store-uri", database, "--artifacts-destination", folder / "artifacts"]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with running(command, folder / "mlflow.log", env=os.environ | quiet):
        deadline = time.monotonic() + 180
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
                break
            assert time.monotonic() < deadline, (folder / "mlflow.log").read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"


def track(uri: str, folder: str, client: int) -> tuple[RunRef, int]:
    """One client: a run with points of several metrics, tags in between; gives how much did not arrive."""
    run = start_run(uri, "stress", f"client {client}", tags={"client": str(client)}, params={"seed": client})
    tracker = Tracker(run, record=Path(folder, f"{client}.jsonl"))
    for step in range(STEPS):
        tracker.log({f"train/{name}": client + step / STEPS for name in range(METRICS)}, step=step)
        if step % 25 == 0:
            tracker.set_tags({"step": str(step)})
    tracker.close("FINISHED", timeout=400)
    return run, tracker.dropped


@pytest.mark.parametrize("database", ["sqlite", "postgresql"])
def test_no_database_is_locked_and_no_metric_lost(database: str, tmp_path: Path) -> None:
    (tmp_path / "db").mkdir()
    if database == "sqlite":
        check(f"sqlite:///{tmp_path}/db/mlflow.db", tmp_path)
        return
    with postgresql(tmp_path / "db") as uri:
        check(uri, tmp_path)


def check(database: str, folder: Path) -> None:
    with mlflow(database, folder) as uri:
        with multiprocessing.get_context("spawn").Pool(PROCESSES) as pool:
            found = pool.map(partial(track, uri, str(folder)), range(CLIENTS), chunksize=1)
        client = connect(uri)
        for number, (run, dropped) in enumerate(found):
            assert dropped == 0
            there = client.get_run(run.run_id)
            assert (there.info.status, there.data.tags["step"]) == ("FINISHED", "75")
            for name in range(METRICS):
                points = client.get_metric_history(run.run_id, f"train/{name}")
                assert {(p.step, p.value) for p in points} == {(s, number + s / STEPS) for s in range(STEPS)}
    assert "database is locked" not in (folder / "mlflow.log").read_text()
