"""The MLflow and the S3 server killed for a minute in mid-run, on a cluster of two nodes: about 8 minutes."""

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import local_cluster
from helpers.local_cluster import BUCKET, Cluster, Submission
from mlflow.tracking import MlflowClient

from arplus.data.dataset import Dataset
from arplus.runs import checkpoint

OUTAGE_S = 60
LOG_EVERY = 2

pytestmark = [pytest.mark.soak, pytest.mark.timeout(2400)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster.running(tmp_path_factory.mktemp("cluster") / "state") as running:
        yield running


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    return local_cluster.prepare(tmp_path_factory.mktemp("prepare"))


def submit(log: Path, data: str, run_name: str, epochs: int) -> Submission:
    """A run that reads its data in many small windows, so that outages fall into its reading too."""
    more = ["--epochs", str(epochs), "--feed.shuffle-window-batches", "8", "--feed.prefetch", "1"]
    return Submission(log, *local_cluster.train_arguments(data, run_name), *more)


def assert_every_point_once(data: str, run_id: str, epochs: int) -> None:
    """Training metrics every ``LOG_EVERY`` steps and at each epoch's end, validation metrics an epoch."""
    steps = -(-Dataset.open(data).split("train").examples // local_cluster.BATCH)
    logged = sum(step % LOG_EVERY == 0 or step % steps == 0 for step in range(1, steps * epochs + 1))
    for key, points in (("train/loss", logged), ("perf/eta_seconds", logged), ("valid/response_ppl", epochs)):
        found = [metric.step for metric in MlflowClient().get_metric_history(run_id, key)]
        assert len(found) == len(set(found)) == points, key


def test_a_minute_without_either_server_costs_nothing(cluster: Cluster, data: str, tmp_path: Path) -> None:
    job = submit(tmp_path / "log", data, "outages", epochs := 8)
    job.wait_for_steps(5)

    cluster.kill("mlflow")
    began = time.monotonic()
    job.wait_for_steps(5, OUTAGE_S)  # training goes on meanwhile
    time.sleep(max(began + OUTAGE_S - time.monotonic(), 0))
    cluster.up()
    job.wait_for(lambda: "MLflow answers again" in job.output)
    assert "MLflow does not answer" in job.output

    cluster.kill("s3")
    began = time.monotonic()
    job.wait_for_steps(1, OUTAGE_S)
    time.sleep(max(began + OUTAGE_S - time.monotonic(), 0))
    cluster.up()
    job.wait_for_steps(30)
    assert job.end() == 0, job.output
    assert "trying again in" in job.output
    assert "the workers were started again" not in job.output

    final = local_cluster.assert_ended_right(cluster, job, data, "outages", epochs)
    for uri in checkpoint.list_complete(f"{BUCKET}/runs/outages"):
        checkpoint.load(uri, moments=True)
    assert_every_point_once(data, final["mlflow_run_id"], epochs)


def test_what_mlflow_missed_to_the_end_is_filled_in_afterwards(cluster: Cluster, data: str, tmp_path: Path) -> None:
    job = submit(tmp_path / "log", data, "missed", epochs := 2)
    job.wait_for_steps(5)
    cluster.kill("mlflow")
    assert job.end() == 0, job.output
    cluster.up()
    (record,) = set(re.findall(r"arplus\.tracking replay (\S+) --mlflow", job.output))
    assert record == f"{BUCKET}/runs/missed/tracking", "it can be read from anywhere"
    subprocess.run(["python", "-m", "arplus.tracking", "replay", record], cwd=local_cluster.ROOT, check=True)
    final = local_cluster.assert_ended_right(cluster, job, data, "missed", epochs)
    assert_every_point_once(data, final["mlflow_run_id"], epochs)
