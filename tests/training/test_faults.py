"""Runs that are killed, stopped, taken over and resumed, on a real Ray: they end as if nothing had happened."""

import random
import re
import signal
import socket
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import audits, faults
from helpers.faults import EXAMPLES, STEPS
from mlflow.tracking import MlflowClient

from arplus import tracking
from arplus.config import TrainConfig
from arplus.errors import RunError
from arplus.runs import attempt, checkpoint
from arplus.runs.attempt import SupersededError
from arplus.runs.checkpoint import TrainProgress
from arplus.runs.folder import FinalMetrics
from arplus.training.trainer import train

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


@pytest.fixture(scope="module")
def undisturbed(finished: tuple[TrainConfig, FinalMetrics]) -> dict[str, torch.Tensor]:
    """The final weights of a run that nothing happened to."""
    config, final = finished
    assert final.steps == STEPS
    assert_each_example_once_an_epoch(config)
    return faults.newest_weights(config)


def assert_each_example_once_an_epoch(config: TrainConfig, epochs: int = 2) -> None:
    assert audits.find_problems(str(faults.folder(config)), np.arange(EXAMPLES), epochs) == []


def mlflow_status(config: TrainConfig, run_id: str) -> str:
    return MlflowClient(tracking.default_uri(config.storage)).get_run(run_id).info.status


def progress_of(config: TrainConfig) -> TrainProgress:
    found = checkpoint.newest(str(faults.folder(config)))
    assert found is not None
    return found[1].progress


@pytest.mark.parametrize(
    ("times", "seed"), [(1, 0), *(pytest.param(3, seed, marks=pytest.mark.soak) for seed in (0, 1, 2))]
)
def test_kills_change_nothing(
    data: str, storage: Path, undisturbed: dict[str, torch.Tensor], times: int, seed: int
) -> None:
    chance = random.Random(seed)
    config = faults.settings(data, storage, run_name=f"killed-{times}-{seed}")
    with ExitStack() as kills:
        steps = chance.sample(range(1 + chance.randrange(10), STEPS - 5, 8), times)
        faults.kill_in_turn(config, kills, steps, chance)
        final = train(config)
    assert faults.attempts(config) == 1 + times
    assert (final.steps, final.examples) == (STEPS, 2 * EXAMPLES)
    assert "response_ppl" in final.valid
    weights = faults.newest_weights(config)
    assert weights.keys() == undisturbed.keys()
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())
    assert_each_example_once_an_epoch(config)
    assert mlflow_status(config, final.mlflow_run_id) == "FINISHED"
    tags = MlflowClient(tracking.default_uri(config.storage)).get_run(final.mlflow_run_id).data.tags
    assert [name for name in sorted(tags) if name.startswith("restart.")] == [f"restart.{2 + i}" for i in range(times)]
    assert re.search(
        r"\n\nWorker [01] on \S+ failed, and all were started again: the tag `restart\.", tags[tracking.NOTE]
    )
    assert re.search(r"UTC, after worker [01] on \S+/[\d.]+: .*died.*\(its log: /.*\.err\)$", tags["restart.2"])


@pytest.mark.soak
def test_a_kill_in_a_second_stage_changes_nothing(
    data: str, storage: Path, finished: tuple[TrainConfig, FinalMetrics]
) -> None:
    """Adapters alone are trained, by a schedule that knows the run's end."""
    found = []
    for name, steps in (("whole", []), ("cut", [9, 20])):
        config = faults.second_stage(faults.settings(data, storage, run_name=f"second-{name}"), finished[0])
        with ExitStack() as kills:
            faults.kill_in_turn(config, kills, steps, random.Random(0))
            assert train(config).steps == STEPS
        assert faults.attempts(config) == 1 + len(steps)
        found.append(faults.newest_weights(config))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_job_saves_and_goes_on_with_other_workers(data: str, storage: Path, number: int) -> None:
    """`ray job stop` is a SIGTERM to the job's process, Ctrl-C a SIGINT; then two workers become one, and four."""
    config = faults.settings(data, storage, run_name=f"stopped-{number}", checkpoint_every=None)
    config = replace(config, model=replace(config.model, dropout=0.0))
    job = faults.start_job(config)
    faults.wait_for_steps(config, 5, job)
    said = faults.end(job, number)
    assert job.returncode == 130, said
    stopped = progress_of(config).step
    assert 5 <= stopped < STEPS // 2, "saved at once, in mid-epoch"
    assert f"interrupted: stopped at step {stopped}; the same command goes on from there" in said
    assert "\nTraceback" not in said, "the job's own lines, not Ray's"
    before = attempt.read(str(faults.folder(config)))
    assert before is not None
    assert mlflow_status(config, before.mlflow_run_id) == "KILLED"

    alone = train(replace(config, workers=1, max_steps=stopped + 9))
    assert alone.steps == stopped + 9
    assert alone.mlflow_run_id == before.mlflow_run_id
    final = train(replace(config, workers=4, zero_stage=3))
    assert (final.steps, final.examples) == (STEPS, 2 * EXAMPLES)
    assert_each_example_once_an_epoch(config)
    assert faults.attempts(config) == 3


@pytest.mark.soak
def test_a_job_whose_run_was_taken_over_stops_and_writes_nothing_more(data: str, storage: Path) -> None:
    config = faults.settings(data, storage, run_name="contested", epochs=20)
    run = str(faults.folder(config))
    left: list[list[str]] = []

    def take_over() -> None:
        found = attempt.read(run)
        assert found is not None
        attempt.take_over(run, found.mlflow_run_id)
        left.append(checkpoint.list_complete(run))

    with (
        faults.disturbed(take_over, lambda: faults.steps_logged(config) >= 20),
        pytest.raises(SupersededError, match="another job has taken this run over"),
    ):
        train(config)
    assert left[0]
    assert checkpoint.list_complete(run) == left[0]
    assert not Path(run, "final_metrics.json").exists()
    now = attempt.read(run)
    assert now is not None
    assert mlflow_status(config, now.mlflow_run_id) == "RUNNING", "it is the other job's"


@pytest.mark.soak
def test_a_worker_that_hangs_is_named_and_the_run_goes_on(
    data: str, storage: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    config = faults.settings(data, storage, run_name="hangs", collective_timeout_minutes=0.3)
    job = faults.start_job(config)
    faults.wait_for_steps(config, 5, job)
    faults.train_workers()[1].suspend()
    said = job.communicate(timeout=300)[0]
    assert job.returncode == 0, said
    assert "no answer for 0.3 minutes (--collective-timeout-minutes): worker 1 on " in said
    assert faults.attempts(config) == 2
    weights = faults.newest_weights(config)
    assert all(torch.equal(weights[name], value) for name, value in undisturbed.items())


def test_a_run_that_fails_too_often_says_so(data: str, storage: Path) -> None:
    config = faults.settings(data, storage, run_name="fails", max_failures=0)
    with (
        faults.disturbed(lambda: faults.kill_a_worker(1), lambda: faults.steps_logged(config) >= 1),
        pytest.raises(RunError, match=r"more than --max-failures 0 allows .* the same command goes on from the newest"),
    ):
        train(config)
    assert faults.attempts(config) == 1
    run = attempt.read(str(faults.folder(config)))
    assert run is not None
    client = MlflowClient(tracking.default_uri(config.storage))
    found = client.get_run(run.mlflow_run_id)
    assert found.info.status == "FAILED"
    tags = found.data.tags
    assert "died" in tags["failure.reason"]
    assert "\n" not in tags["failure.reason"]
    assert tags["failure.rank"] in "01"
    assert socket.gethostname() in tags["failure.node"]
    assert Path(tags["failure.log"]).exists()
    assert tags["mlflow.note.content"].startswith("**Failed:** ")
    assert train(replace(config, max_failures=1)).steps == STEPS
    found = client.get_run(run.mlflow_run_id)
    assert found.info.status == "FINISHED"
    assert not [name for name in found.data.tags if name.startswith("failure.")], "it went on and ended well"
