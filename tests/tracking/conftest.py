"""Stores of MLflow runs: a sqlite file, a server that can be killed, and none at all."""

import os
import signal
import subprocess
import sys
import time
import urllib.request

import pytest
from helpers.logged_runs import free_port

from arplus.tracking import RunRef


@pytest.fixture(autouse=True)
def _no_tracking_variable(monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture(scope="session")
def store(tmp_path_factory):
    """A sqlite store, made once: its tables take seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('store')}/runs/mlflow.db"


class Server:
    """A real MLflow server on loopback that can be killed and started again on the same store."""

    def __init__(self, folder):
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.folder = folder
        self.process = None

    def start(self):
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(self.port)]
        command += ["--workers", "1", "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db"]
        command += ["--artifacts-destination", f"{self.folder}/artifacts"]
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        with open(f"{self.folder}/server.log", "ab") as log:
            self.process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"{self.uri}/health", timeout=2):
                    return
            except OSError:
                assert self.process.poll() is None, "the server stopped by itself"
                time.sleep(0.2)
        raise AssertionError("the server did not start within 120 s")

    def kill(self):
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its worker
            self.process.wait(10)
            self.process = None


@pytest.fixture(scope="session")
def server(tmp_path_factory):
    """An MLflow server for all tests; whoever kills it starts it again."""
    running = Server(tmp_path_factory.mktemp("server"))
    try:
        running.start()
        yield running
    finally:
        running.kill()


class Refusing:
    """A client without a server."""

    def __getattr__(self, name):
        raise ConnectionError("connection refused")


@pytest.fixture
def no_server(monkeypatch):
    monkeypatch.setattr("arplus.tracking.tracker.make_client", lambda uri: Refusing())
    return RunRef("http://user:hunter2@127.0.0.1:1", "1", "0" * 32)
