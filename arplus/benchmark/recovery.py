"""What a failure costs: how long a run stands still after a worker's death, and what checkpoints cost it.

A run of the real training path is started on this machine, and one of its workers is killed with -9 in the middle. The
run's own record of metrics tells what followed.
"""

import json
import logging
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import ray
from ray.util.state import list_actors

from arplus import storage
from arplus.benchmark.figures import Result, size
from arplus.benchmark.options import FaultsBenchmark
from arplus.cluster import connection
from arplus.config import PrepareConfig, SynthesizeConfig, TrainConfig, preset, tiny
from arplus.errors import RunError
from arplus.prepare.pipeline import prepare
from arplus.runs import checkpoint
from arplus.synthetic.write import synthesize
from arplus.training.trainer import train

log = logging.getLogger(__name__)

STALL = "perf/checkpoint_seconds"
"""The metric of how long training stood still for a checkpoint."""


@dataclass(frozen=True)
class Recovery:
    """What followed a kill, by the run's record."""

    seconds: float
    """From the kill to the end of the first step that the new workers made."""
    repeated_steps: int
    """Steps since the last checkpoint, trained again."""


def measure(config: FaultsBenchmark) -> Result:
    """Joins Ray, and measures on its cluster, with the run and its data in a temporary folder of this machine."""
    connection.connect()
    with tempfile.TemporaryDirectory() as folder:
        run = _settings(config, Path(folder))
        run_uri = storage.join(run.storage, run.run_name)
        record = Path(run_uri, "tracking.jsonl")
        with _kill_at(config.steps // 2, record, config.batch_size) as killed_at:
            train(run)
        events = read_events(record)
        newest = checkpoint.list_complete(run_uri)[-1]
        state = sum(storage.size(file) for file in storage.list_files(newest))
        written = _time_to_write(run_uri, newest)
    recovery = recovery_after(killed_at[0], events, config.batch_size)
    step = median(after - before for (before, _), (after, _) in pairwise(_steps(events, 1)))
    stall = median(event["value"] for event in events if event.get("key") == STALL)
    minutes = TrainConfig.checkpoint_minutes
    assert minutes is not None
    share = (stall + written) / (stall + 60 * minutes)
    return Result(
        figures={
            "kill_to_first_step_seconds": recovery.seconds,
            "repeated_steps": recovery.repeated_steps,
            "checkpoint_stall_seconds": stall,
            "checkpoint_write_seconds": written,
            "checkpoint_bytes": state,
            "checkpoint_share": share,
        },
        table=[
            ("kill -9 to the first new step", f"{recovery.seconds:.1f} s, of which one step is {step:.1f} s"),
            ("steps trained again", f"{recovery.repeated_steps}"),
            ("a checkpoint", f"{size(state)}"),
            ("training stands still for", f"{stall:.2f} s (median)"),
            ("its writing in the background", f"{written:.2f} s"),
            ("share of the time", f"{share:.2%} at most, with a checkpoint every {minutes:g} minutes (the default)"),
        ],
    )


def read_events(record: Path) -> list[dict[str, Any]]:
    """The events of a run's record, in order; a line that is still being written is left out."""
    if not record.exists():
        return []
    lines = record.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def recovery_after(killed_at: float, events: list[dict[str, Any]], batch_size: int) -> Recovery:
    """What followed a kill at ``killed_at`` (seconds since 1970); raises :class:`RunError` where no step did.

    The new workers' first step is the first one that does not go on from the step before it: a worker that lives on
    may still end a step after another one's death.
    """
    last = 0
    for when, step in _steps(events, batch_size):
        if when > killed_at and step <= last:
            return Recovery(when - killed_at, last - step + 1)
        last = max(last, step)
    raise RunError("no step was trained again after the kill; take more --steps")


def _steps(events: list[dict[str, Any]], batch_size: int) -> Iterator[tuple[float, int]]:
    """When each training step was logged (seconds since 1970), and its number."""
    for event in events:
        if event.get("key") == "train/loss":
            yield event["timestamp"] / 1000, event["step"] // batch_size


def _settings(config: FaultsBenchmark, folder: Path) -> TrainConfig:
    raw, data = str(folder / "raw"), str(folder / "data")
    synthesize(SynthesizeConfig(output=raw, records=config.records))
    prepare(PrepareConfig(input=raw, output=data, valid=0.01, test=0.01))
    run = preset(config.preset)
    # The kill falls between two checkpoints, so that steps are trained again and the new ones can be told.
    every = max(2, config.steps // 4 - 1)
    while (config.steps // 2) % every == 0:
        every += 1
    return replace(
        tiny(run) if config.tiny else run,
        data=data,
        storage=str(folder / "runs"),
        run_name="faults",
        workers=config.workers,
        batch_size=config.batch_size,
        max_steps=config.steps,
        log_every=1,
        checkpoint_every=every,
    )


@contextmanager
def _kill_at(step: int, record: Path, batch_size: int) -> Iterator[list[float]]:
    """Kills a worker once the run has logged ``step`` steps; gives when (seconds since 1970) in a list of one."""
    over = threading.Event()
    killed_at: list[float] = []

    def watch() -> None:
        worker = None
        while not over.wait(0.05):
            done = max((done for _, done in _steps(read_events(record), batch_size)), default=0)
            if done and worker is None:
                worker = find_worker()  # takes seconds, so before it is time
            if done >= step and worker is not None:
                log.info("killing the worker with process id %d", worker)
                os.kill(worker, signal.SIGKILL)
                killed_at.append(time.time())
                return

    thread = threading.Thread(target=watch, name="kill", daemon=True)
    thread.start()
    try:
        yield killed_at
    finally:
        over.set()
        thread.join()
    if not killed_at:
        raise RunError("the run ended before a worker was killed; take more --steps")


def find_worker() -> int:
    """Process id of one of this job's training workers; they are on this machine, where the run's folder is."""
    context = ray.get_runtime_context()
    wanted = {"class_name": "RayTrainWorker", "state": "ALIVE", "job_id": context.get_job_id()}
    filters: Any = [(key, "=", value) for key, value in wanted.items()]
    workers: list[Any] = list_actors(address=context.gcs_address, filters=filters, limit=1000)
    return int(workers[-1].pid)


def _time_to_write(run_uri: str, newest: str) -> float:
    """Seconds to write the newest checkpoint once more, as the background thread does."""
    state = checkpoint.load(newest, moments=True)
    began = time.perf_counter()
    checkpoint.save(run_uri, state)
    return time.perf_counter() - began
