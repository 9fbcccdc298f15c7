"""Runs on machines that come and go: a node is lost and replaced, or announces that it will be. About 8 minutes."""

import logging
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from helpers import audits, faults
from helpers.prepared import write_dataset
from mlflow.tracking import MlflowClient

from arplus import tracking
from arplus.config import TrainConfig
from arplus.runs import checkpoint

log = logging.getLogger(__name__)

HOST = "127.0.0.2"
"""Ray takes 127.0.0.1 for any address of this machine, and then looks for the head at another one."""
EXAMPLES = 1000
EPOCHS = 2

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Node:
    """A node of one CPU, as a process of its own."""

    name: str
    address: str
    process: psutil.Process

    def has_worker(self) -> bool:
        """Whether a training worker runs there."""
        return any("RayTrainWorker" in " ".join(p.cmdline()) for p in self.process.children(recursive=True))

    def cluster(self) -> list[Any]:
        """All nodes of the cluster that this one is of."""
        from ray._raylet import GcsClient

        return list(GcsClient(address=self.address).get_all_node_info(timeout=30).values())

    def drain(self, seconds: int) -> None:
        """Announces, as a cloud does, that the node goes away."""
        (node_id,) = (info.node_id.hex() for info in self.cluster() if info.node_name == self.name)
        reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "a test"]
        ray(
            "drain-node",
            "--address",
            self.address,
            "--node-id",
            node_id,
            *reason,
            f"--deadline-remaining-seconds={seconds}",
        )

    def kill(self) -> None:
        """Kills the node's raylet with -9; what it had started ends by itself."""
        (raylet,) = (child for child in self.process.children() if child.name() == "raylet")
        raylet.kill()


def answers(port: int) -> bool:
    """Whether something listens there."""
    with socket.socket() as one:
        return one.connect_ex((HOST, port)) == 0


def ray(*arguments: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name("ray")), *arguments], check=True, timeout=120)


@contextmanager
def started(*arguments: str) -> Iterator[psutil.Process]:
    """``ray start`` as a process that stays, and goes with all that it has started."""
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=1", *arguments]
    process = psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield process
    finally:
        if process.is_running():
            family = [*process.children(recursive=True), process]
            process.terminate()
            _, alive = psutil.wait_procs(family, timeout=20)
            for one in alive:
                one.kill()


@dataclass(frozen=True)
class Cluster:
    """A head of one CPU, and nodes."""

    address: str
    nodes: list[Node]
    stack: ExitStack

    def add(self, name: str) -> None:
        """Starts a node and waits until the head knows it."""
        command = f"--address={self.address}", f"--node-ip-address={HOST}", f"--node-name={name}"
        node = Node(name, self.address, self.stack.enter_context(started(*command)))
        self.nodes.append(node)
        wait_for(lambda: any(info.node_name == name for info in node.cluster()), seconds=120)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A head and two nodes of one CPU each: room for two workers and the data feed."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with ExitStack() as stack:
        stack.enter_context(started("--head", f"--node-ip-address={HOST}", f"--port={port}", "--dashboard-port=0"))
        wait_for(lambda: answers(port), seconds=120)
        found = Cluster(f"{HOST}:{port}", [], stack)
        for name in ("first", "second"):  # one after the other: two at once may choose the same port
            found.add(name)
        yield found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[EXAMPLES]], "valid": [[100]]}).uri


def wait_for(happened: Callable[[], bool], seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def settings(data: str, storage: Path, **changes: object) -> TrainConfig:
    """Seven examples per step: an odd one for two workers."""
    changes = {"epochs": EPOCHS} | changes
    return faults.settings(data, storage, workers="1:2", batch_size=7, cpus_per_worker=1.0, **changes)


def start(config: TrainConfig, cluster: Cluster) -> tuple[subprocess.Popen[str], Node]:
    """Starts a job that gets two workers; the job, and a node that has one of them."""
    job = faults.start_job(config, address=cluster.address)
    faults.wait_for_steps(config, 10, job)
    return job, next(node for node in cluster.nodes if node.has_worker())


def worker_counts(config: TrainConfig) -> list[int]:
    """How many workers the run had, in order, from what it tracked."""
    client = MlflowClient(tracking.default_uri(config.storage))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, f"attributes.run_name = '{config.run_name}'")
    history = sorted(client.get_metric_history(run.info.run_id, "perf/workers"), key=lambda m: m.timestamp)
    counts = [int(m.value) for m in history]
    return [n for n, before in zip(counts, [0, *counts[:-1]], strict=True) if n != before]


def assert_ended_right(config: TrainConfig, job: subprocess.Popen[str]) -> str:
    said, _ = job.communicate(timeout=600)
    assert job.returncode == 0, said
    assert audits.find_problems(str(faults.folder(config)), np.arange(EXAMPLES), config.epochs) == []
    found = checkpoint.newest(str(faults.folder(config)))
    assert found is not None
    assert found[1].progress.step == config.epochs * -(-EXAMPLES // config.batch_size)
    return said


def test_a_run_shrinks_with_a_node_that_is_lost_and_grows_with_its_replacement(
    data: str, cluster: Cluster, tmp_path: Path
) -> None:
    config = settings(data, tmp_path, run_name="lost", checkpoint_every=50, epochs=12)
    job, node = start(config, cluster)
    before = faults.steps_logged(config)
    node.kill()
    begun = time.monotonic()
    wait_for(lambda: faults.attempts(config) > 1)
    faults.wait_for_steps(config, before + 30, job)
    log.warning("training again %.0f s after the loss", time.monotonic() - begun)
    assert worker_counts(config) == [2, 1]
    cluster.add("third")
    said = assert_ended_right(config, job)
    assert "1 of them: going on from" in said
    assert worker_counts(config) == [2, 1, 2]


def test_a_node_that_says_it_goes_away_is_saved_from_at_once(data: str, cluster: Cluster, tmp_path: Path) -> None:
    """Nothing else would make a checkpoint before the epoch's end, and the node stays: nothing new starts there."""
    config = settings(data, tmp_path, run_name="drained", checkpoint_every=None, epochs=10)
    job, node = start(config, cluster)
    assert checkpoint.list_complete(str(faults.folder(config))) == []
    node.drain(seconds=40)
    wait_for(lambda: bool(checkpoint.list_complete(str(faults.folder(config)))), seconds=40)
    said = assert_ended_right(config, job)
    assert re.search(r"nodes \w+ will be taken away: saving now", said)
    assert "going on from step" in said
    assert worker_counts(config) == [2, 1]
