"""The long proofs of a sweep: about 20 minutes on two quiet cores (reckoned, not yet measured in one go)."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from helpers import faults
from helpers.prepared import write_dataset
from mlflow.tracking import MlflowClient

from arplus.config import TuneConfig, preset, tiny, with_values
from arplus.runs import attempt
from arplus.study import tune
from arplus.study.record import StudyFolder, Trial

ROOT = Path(__file__).parents[2]

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = {"train": [[200, 200], [200]], "valid": [[60]]}
    return write_dataset(tmp_path_factory.mktemp("data"), files).uri


def command(data: str, storage: Path, *more: str) -> list[str]:
    """The documented sweep: eight tiny trials on two CPUs."""
    flags = shlex.split("arplus --tiny --trials 8 --examples 320 --validations 4 --batch-size 16 --run-name eight")
    job = [sys.executable, str(ROOT / "jobs" / "tune.py"), *flags]
    return [*job, "--data", data, "--storage", str(storage), *more]


def environment() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}


def records(storage: Path) -> dict[str, Trial]:
    return {trial.name: trial for trial in StudyFolder(str(storage / "eight")).trials()}


def starts(storage: Path, trial: str) -> int:
    """How often a trial's workers have been started."""
    found = attempt.read(str(storage / "eight" / "runs" / trial))
    return found.number if found else 0


def ready(storage: Path, ended: int) -> bool:
    """Whether so many trials have ended and the workers of another one are there."""
    now = records(storage)
    running = [t.name for t in now.values() if t.outcome == "running"]
    return sum(t.ended for t in now.values()) >= ended and any(starts(storage, name) for name in running)


def mlflow_runs(storage: Path, experiment: str) -> dict[str, Any]:
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    found = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    assert len({run.info.run_name for run in found}) == len(found), "no run twice"
    return {run.info.run_name: run for run in found}


def test_eight_tiny_trials_on_two_cpus_through_two_kills_of_the_driver(data: str, tmp_path: Path) -> None:
    """SIGKILL while a trial runs, twice: no finished trial is lost or repeated, and no MLflow run is left RUNNING."""
    kept: dict[str, Trial] = {}
    for ended in (1, 3):
        with open(tmp_path / f"killed-{ended}.log", "wb") as log:
            job = subprocess.Popen(
                command(data, tmp_path), cwd=ROOT, env=environment(), stdout=log, stderr=log, start_new_session=True
            )
            try:
                deadline = time.monotonic() + 900
                while not ready(tmp_path, ended):
                    assert job.poll() is None, (tmp_path / f"killed-{ended}.log").read_text()[-3000:]
                    assert time.monotonic() < deadline, "the sweep does not get going"
                    time.sleep(0.2)
            finally:
                job.kill()
                job.wait(30)
            time.sleep(5)  # Ray's processes end with their driver
        kept |= {name: trial for name, trial in records(tmp_path).items() if trial.ended}
        assert "RUNNING" in {run.info.status for run in mlflow_runs(tmp_path, "eight").values()}

    last = subprocess.run(
        command(data, tmp_path), cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200
    )
    assert last.returncode == 0, last.stderr[-3000:]
    trials = records(tmp_path)
    assert list(trials) == [f"trial-{n:04d}" for n in range(1, 9)]
    assert all(trial.outcome in ("finished", "stopped") for trial in trials.values())
    for name, trial in kept.items():
        assert trials[name].results == trial.results, "it was not run again"
    runs = mlflow_runs(tmp_path, "eight")
    assert sorted(runs) == ["eight", *trials]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert any(run.data.tags.get("attempts") == "2" for run in runs.values()), "a trial went on from its checkpoint"
    best = min(trials.values(), key=lambda t: t.score or 0)
    assert f"best: {best.name}" in last.stdout
    assert re.search(r"^compare +http", last.stderr, re.MULTILINE)


def test_a_sweep_told_to_end_saves_its_trial_and_goes_on(data: str, tmp_path: Path) -> None:
    """`ray job stop` is a SIGTERM to the job's process."""
    slow = ("--trials", "2", "--examples", "40000", "--epochs", "100", "--scheduler", "none", "--validations", "400")
    with open(tmp_path / "log", "wb") as log:
        job = subprocess.Popen(command(data, tmp_path, *slow), cwd=ROOT, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 900
        while not any(t.results for t in records(tmp_path).values()):
            assert job.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline, "the sweep does not get going"
            time.sleep(0.2)
        job.send_signal(signal.SIGTERM)
        assert job.wait(300) == 130
    finally:
        job.kill()
    assert "interrupted: study eight: stopped; the same command goes on with it" in (tmp_path / "log").read_text()
    assert {run.info.status for run in mlflow_runs(tmp_path, "eight").values()} == {"KILLED"}
    assert list((tmp_path / "eight" / "runs" / "trial-0001" / "checkpoints").glob("*/manifest.json"))
    assert [t.outcome for t in records(tmp_path).values()] == ["running"]


def small(data: str, storage: Path, **changes: Any) -> TuneConfig:
    """A run of a few seconds that starts at a rate far from the best."""
    run = tiny(preset("arplus"))
    model = replace(run.model, d_model=32, embedding_size=16, heads=2, ff_size=48, ff_bottleneck=16)
    run = replace(run, model=model, optimizer=replace(run.optimizer, lr=1e-5), data=data, storage=str(storage))
    config = TuneConfig(run=replace(run, batch_size=8))
    space = ("optimizer.lr=loguniform(1e-5,0.1)", "objective.lambda1=fixed")
    return with_values(config, {"space": space, "examples": 600, "validations": 3} | changes, source="test")


@pytest.mark.usefixtures("ray_cluster")
def test_a_trial_whose_process_dies_goes_on_from_its_checkpoint(data: str, tmp_path: Path) -> None:
    """The process that drives the trial: with it go the run's controller and its workers."""
    config = small(data, tmp_path, run_name="dies", trials=1)
    config = with_values(config, {"validations": 20, "optimizer.lr": 1e-2}, source="test")

    def checkpoints() -> list[Path]:
        return list((tmp_path / "dies" / "runs" / "trial-0001" / "checkpoints").glob("*/manifest.json"))

    with faults.disturbed(kill_the_trial, lambda: len(checkpoints()) > 0):
        result = tune.sweep(config)
    (trial,) = result["trials"]
    assert trial["outcome"] == "finished"
    examples = [r["examples"] for r in trial["results"]]
    assert examples == sorted(set(examples)), "no validation twice"
    assert trial["final"]["examples"] == 600
    runs = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").search_runs(["1"])
    assert {run.info.run_name: run.data.tags.get("attempts") for run in runs} == {"dies": None, "trial-0001": "2"}


def kill_the_trial() -> None:
    found = [p for p in psutil.Process().children(recursive=True) if "ResourceTrainable" in " ".join(p.cmdline())]
    assert len(found) == 1
    found[0].kill()


@pytest.fixture(scope="module")
def best_of_grid(data: str, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> dict[float, float]:
    """Response perplexity by learning rate, half a decade apart."""
    config = small(data, tmp_path_factory.mktemp("grid"), run_name="grid", search="grid", grid_points=9, trials=9)
    result = tune.sweep(replace(config, scheduler="none", concurrency=2))
    scores = {
        t["values"]["optimizer.lr"]: t["results"][-1]["best_response_ppl"] for t in result["trials"] if t["results"]
    }
    assert len(scores) >= 7, "only the highest rates may diverge"
    return scores


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("seed", range(3))
def test_a_sweep_finds_the_best_rate_of_a_grid(
    data: str, tmp_path: Path, best_of_grid: dict[float, float], seed: int
) -> None:
    """Within twelve trials, the worse of which ASHA stops early; two side by side."""
    rate = min(best_of_grid, key=lambda r: best_of_grid[r])
    result = tune.sweep(small(data, tmp_path, run_name="search", trials=12, seed=seed, concurrency=2))
    found = result["values"]["optimizer.lr"]
    assert rate / 10**0.75 < found < rate * 10**0.75, f"the grid's best is {rate:.1e}, the sweep's {found:.1e}"
    assert result["response_ppl"] <= 1.03 * best_of_grid[rate]
    outcomes = [t["outcome"] for t in result["trials"]]
    assert outcomes.count("stopped") >= 1
    deadline = time.monotonic() + 60
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.5)
    assert ray.available_resources()["CPU"] == 2, "ASHA's stopped trials have given back what they held"
