"""The cluster of ``cluster/local.sh`` for tests: submits jobs as the README says, and kills parts of it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arplus import storage
from arplus.data.dataset import Dataset
from helpers import audits

ROOT = Path(__file__).parents[2]
BUCKET = "s3://arplus"
BATCH = 32
EPOCHS = 2
COLOUR = re.compile(r"\x1b\[\d+m")


def submitted_lines() -> list[str]:
    """The lines of ``cluster/README.md`` that submit each job once, in the order in which they build on each other."""
    paragraphs = [p.strip("\n").splitlines() for p in (ROOT / "cluster" / "README.md").read_text().split("\n\n")]
    return next(lines for lines in paragraphs if "jobs/synthesize.py" in lines[0] and "jobs/export.py" in lines[-1])


@dataclass(frozen=True)
class Cluster:
    """A cluster that runs; this process's environment is the one that its ``env`` file makes."""

    state: Path

    def up(self) -> None:
        """Starts what does not run."""
        subprocess.run([ROOT / "cluster" / "local.sh", "up"], check=True, timeout=600)

    def process(self, name: str) -> psutil.Process:
        """The process that ``local.sh`` started under a name."""
        return psutil.Process(int((self.state / f"{name}.pid").read_text().split()[0]))

    def kill(self, name: str) -> None:
        """Kills a server with all its processes, with -9."""
        process = self.process(name)
        for one in [*process.children(recursive=True), process]:
            one.kill()
        process.wait(30)

    def kill_raylet(self, name: str) -> None:
        """Kills a node's raylet with -9; what Ray had started on the node ends by itself."""
        process = self.process(name)
        (raylet,) = (child for child in process.children() if child.name() == "raylet")
        raylet.kill()
        process.wait(60)

    def runs(self, run_name: str) -> list[Any]:
        """MLflow's runs of that name."""
        from mlflow.tracking import MlflowClient

        return list(MlflowClient().search_runs(["1"], f"attributes.run_name = '{run_name}'"))


class Submission:
    """``ray job submit --working-dir . -- python …``, as the README says, in the background."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        command = ["ray", "job", "submit", "--working-dir", ".", "--", "python", *arguments]
        with open(log, "wb") as output:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)

    @property
    def output(self) -> str:
        """What it has written so far."""
        return COLOUR.sub("", self.log.read_text(errors="replace"))

    @property
    def job_id(self) -> str:
        """Ray's name of the job."""
        found = re.search(r"Job '(\w+)' submitted", self.output)
        assert found, self.output
        return found[1]

    def steps(self) -> int:
        """Log lines of training steps so far, over all starts of the workers."""
        return len(re.findall(r"\bstep \d+/\d+ epoch", self.output))

    def wait_for(self, what: Callable[[], bool], seconds: float = 240) -> float:
        """Waits until ``what`` holds, and gives the seconds that it took."""
        began = time.monotonic()
        while not what():
            assert self.process.poll() is None, self.output
            assert time.monotonic() - began < seconds, self.output
            time.sleep(0.1)
        return time.monotonic() - began

    def wait_for_steps(self, more: int, seconds: float = 240) -> float:
        """Waits for that many further log lines of steps, and gives the seconds that it took."""
        before = self.steps()
        return self.wait_for(lambda: self.steps() >= before + more, seconds)

    def end(self, seconds: float = 900) -> int:
        """Waits for the end; the exit code of `ray job submit`, which is 0 where the job's is."""
        return self.process.wait(seconds)

    def driver(self) -> psutil.Process:
        """The job's own process."""
        wanted = self.output.partition("Running entrypoint for job")[2].split("\n")[0].partition(": ")[2].split()
        (found,) = (p for p in psutil.process_iter(["cmdline"]) if (p.info["cmdline"] or [])[1:] == wanted[1:])
        return found

    def result(self) -> dict[str, Any]:
        """What a job of training prints, in one line of JSON."""
        lines = [line for line in self.output.splitlines() if line.startswith("{")]
        result = json.loads(lines[-1])
        assert isinstance(result, dict)
        return result


@contextmanager
def running(state: Path, **more: str) -> Iterator[Cluster]:
    """A cluster in the folder ``state``, whose servers also get the variables ``more``; it is gone afterwards."""
    with pytest.MonkeyPatch.context() as variables:
        for name in [name for name in os.environ if name.startswith(("AWS_", "RAY_", "MLFLOW_"))]:
            variables.delenv(name)
        for name, value in ({"ARPLUS_CLUSTER": str(state)} | more).items():
            variables.setenv(name, value)
        cluster = Cluster(state)
        try:
            cluster.up()
            for name, value in _environment(state).items():
                variables.setenv(name, value)
            yield cluster
        finally:
            subprocess.run([ROOT / "cluster" / "local.sh", "down"], check=False, timeout=120)


def _environment(state: Path) -> dict[str, str]:
    """What `source …/env` makes of this process's environment."""
    command = ["bash", "-c", 'source "$1" && exec "$2" -c "import json, os; print(json.dumps(dict(os.environ)))"', "-"]
    done = subprocess.run([*command, state / "env", sys.executable], capture_output=True, check=True)
    return dict(json.loads(done.stdout))


def prepare(folder: Path, records: int = 2000) -> str:
    """Synthesizes and prepares a small set through `ray job submit`; its URI."""
    raw, data = f"{BUCKET}/raw", f"{BUCKET}/data"
    for name, *arguments in (
        ("synthesize", "--records", str(records), "--output", raw, "--seed", "1"),
        ("prepare", "--input", raw, "--output", data),
    ):
        job = Submission(folder / f"{name}.log", f"jobs/{name}.py", *arguments)
        assert job.end() == 0, job.output
    return data


def train_arguments(data: str, run_name: str) -> Sequence[str]:
    """A run of one worker a node: a node has three CPUs, a worker takes two, and the feed what is left."""
    settings = {
        "--data": data,
        "--storage": f"{BUCKET}/runs",
        "--run-name": run_name,
        "--workers": 2,
        "--cpus-per-worker": 2,
        "--batch-size": BATCH,
        "--epochs": EPOCHS,
        "--checkpoint-every": 15,
        "--log-every": 2,
        "--audit": True,
    }
    return ["jobs/train.py", "arplus", "--tiny", *(str(part) for item in settings.items() for part in item)]


def assert_ended_right(
    cluster: Cluster, job: Submission, data: str, run_name: str, epochs: int = EPOCHS
) -> dict[str, Any]:
    """A finished run, whatever happened to it: each example once an epoch, one MLflow run; its final metrics."""
    uri = f"{BUCKET}/runs/{run_name}"
    final = storage.read_json(f"{uri}/final_metrics.json")
    assert job.result() == final
    assert audits.find_problems(uri, example_ids(data), epochs) == []
    (run,) = cluster.runs(run_name)
    assert run.info.run_id == final["mlflow_run_id"]
    assert run.info.status == "FINISHED"
    return dict(final)


def example_ids(data: str) -> np.ndarray:
    """Ids of all training examples of a data set."""
    files = dict.fromkeys(group.file for group in Dataset.open(data).split("train").row_groups)
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(uri)), columns=["example_id"]) for uri in files]
    return pa.concat_tables(tables)["example_id"].to_numpy()
