"""Runs that are disturbed: what kills workers and jobs at a chosen moment, for tests on a real Ray."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from arplus.config import TrainConfig, to_dict
from arplus.runs import checkpoint
from helpers.small_models import smallest_run

ROOT = Path(__file__).parents[2]
EXAMPLES, VALID = 132, 21
STEPS = 2 * 17
"""Of a run by these settings on the data set of the training's tests."""


def settings(data: str, storage: Path, **changes: Any) -> TrainConfig:
    """A small run of two workers with dropout, an audit and a checkpoint every seven steps."""
    config = replace(
        smallest_run(),
        data=data,
        storage=str(storage),
        workers=2,
        batch_size=8,
        epochs=2,
        log_every=1,
        checkpoint_every=7,
        audit=True,
    )
    return replace(config, **changes)


def second_stage(config: TrainConfig, first: TrainConfig) -> TrainConfig:
    """``config`` as a run that starts from the best of ``first``, and trains adapters by the linear schedule."""
    optimizer = replace(config.optimizer, only=("adapters", "norms and gates"), schedule="linear", warmup=4)
    model = replace(config.model, adapter=4)
    return replace(config, init_from=str(folder(first)), model=model, optimizer=optimizer)


def folder(config: TrainConfig) -> Path:
    """The folder of a run on local storage."""
    return Path(config.storage) / config.run_name


def steps_logged(config: TrainConfig) -> int:
    """Training steps that a run has logged, over all its attempts; needs ``log_every=1``."""
    record = folder(config) / "tracking.jsonl"
    return record.read_text().count('"train/loss"') if record.exists() else 0


def attempts(config: TrainConfig) -> int:
    """How often a run's workers were started."""
    return int(json.loads((folder(config) / "attempt.json").read_text())["number"])


def newest_weights(config: TrainConfig) -> dict[str, torch.Tensor]:
    """The weights of a run's newest checkpoint."""
    found = checkpoint.newest(str(folder(config)))
    assert found is not None
    return found[1].weights


def own_processes(word: str) -> list[psutil.Process]:
    """The processes that this test session has started, by a word of their command lines."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if word in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:  # it has just ended
            continue
    return found


def train_workers() -> list[psutil.Process]:
    """Ray Train's worker processes of this test session's own cluster."""
    return own_processes("RayTrainWorker")


@contextmanager
def disturbed(act: Callable[[], None], when: Callable[[], bool]) -> Iterator[None]:
    """Calls ``act`` once in the background as soon as ``when`` says so; the block must outlast that."""
    over, acted = threading.Event(), threading.Event()

    def watch() -> None:
        while not over.wait(0.01):
            if when():
                act()
                acted.set()
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    assert acted.is_set(), "the run ended before it was disturbed"


def kill_in_turn(config: TrainConfig, kills: ExitStack, steps: Iterable[int], chance: random.Random) -> None:
    """Enters into ``kills`` one kill of a worker at each of these steps, and after the restart from the one before.

    Steps are logged a few at a time, so two kills might come at once.
    """
    for started, step in enumerate(sorted(steps), start=1):
        act = partial(kill_a_worker, chance.randrange(2))

        def due(started: int = started, step: int = step) -> bool:
            return steps_logged(config) >= step and attempts(config) >= started

        kills.enter_context(disturbed(act, due))


def kill_a_worker(which: int) -> None:
    """Kills a worker with -9, as the kernel's memory killer or a lost machine does."""
    workers = train_workers()
    assert workers, "no worker is there"
    workers[which % len(workers)].kill()


def start_job(config: TrainConfig, *more: str, address: str | None = None) -> subprocess.Popen[str]:
    """``jobs/train.py`` as a process of its own, on the cluster at an address, by default this session's."""
    file = folder(config).with_suffix(".settings.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(to_dict(config)))
    address = address or ray.get_runtime_context().gcs_address
    return subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(file), *more],
        cwd=ROOT,
        env=os.environ | {"RAY_ADDRESS": address},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_steps(config: TrainConfig, steps: int, job: subprocess.Popen[str], timeout: float = 240) -> None:
    """Waits until a job's run has logged ``steps`` steps."""
    deadline = time.monotonic() + timeout
    while steps_logged(config) < steps:
        assert job.poll() is None, job.communicate()[0]
        assert time.monotonic() < deadline, "the job does not get going"
        time.sleep(0.05)


def end(job: subprocess.Popen[str], number: int = signal.SIGTERM) -> str:
    """Sends a signal to a job's process and gives what it has written."""
    job.send_signal(number)
    return job.communicate(timeout=120)[0]
