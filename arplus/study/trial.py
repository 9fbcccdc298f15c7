"""One run of a study as a Ray Tune trial: a small process that drives a Ray Train run and passes its validations on.

A trial asks for almost nothing, since the run's workers have resources of their own; but not for zero CPUs, with which
Tune waits for ever on a small cluster (ray#54305).

It is a class, not a function. Tune ends a function by killing its process, which leaves a run's workers, its MLflow run
and its last values to chance; a class is told to stop, so that its workers save, and give back what they hold, before
the next trial starts (ray#58515).
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import ray.train
from ray import tune
from ray.util.queue import Empty, Queue

from arplus import storage, tracking
from arplus.errors import ArplusError, RunError, UsageError
from arplus.runs import attempt
from arplus.runs.attempt import Attempt, StoppedError
from arplus.study.record import OBJECTIVE, Trial
from arplus.training.engine import NonFiniteLossError
from arplus.training.hooks import StudyContext
from arplus.training.trainer import train

log = logging.getLogger(__name__)

RESOURCES: dict[str, float] = {"memory": 64 << 20}
"""What Tune reserves for a trial's own process."""
DIVERGED = 1e300
"""Objective of a run whose loss became infinite: worse than any other, and still a number that can be ranked."""
STOP_S = 300.0
"""Seconds that a run has to save and end when it is stopped early."""


class Validations(ray.train.UserCallback):
    """Passes what the workers report at each validation to the trial; lives in Ray Train's controller."""

    def __init__(self, queue: Queue) -> None:
        self.queue = queue

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Rank 0's metrics, which are the same on all ranks."""
        self.queue.put(metrics[0])


class TrialProcess(tune.Trainable):
    """The trial.

    Its config holds ``record`` (URI of the :class:`Trial`), ``study`` (its name), ``parent_run_id`` and what a
    :class:`arplus.study.slots.Slots` says.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Starts the run; it goes on from its newest checkpoint where it has one."""
        self.record_uri: str = config["record"]
        trial = self._record()
        self.run = replace(trial.settings, cpus_per_worker=config["cpus_per_worker"], device=config["device"])
        self.run_uri = storage.join(self.run.storage, self.run.run_name)
        self.best = trial.score
        self.final: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.examples = 0
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.part = StudyContext(
            parent_run_id=config["parent_run_id"],
            tags={"study": config["study"], "trial": trial.name},
            side_by_side=config["side_by_side"],
        )
        before = storage.with_retries(self.run_uri, lambda: attempt.read(self.run_uri))
        self.before = before and before.owner
        self.owner: str | None = None
        self.thread = threading.Thread(target=self._train, name=trial.name, daemon=True)
        self.thread.start()

    def step(self) -> dict[str, Any]:
        """The next validation; after the last one, how the run ended."""
        while True:
            alive = self.thread.is_alive()
            try:
                return self._validation(self.queue.get(timeout=0.5))
            except Empty:
                if not alive:
                    return self._end()

    def cleanup(self) -> None:
        """Ends a run that is stopped early: its workers save and go, and so does its MLflow run."""
        deadline = time.monotonic() + STOP_S
        while self.thread.is_alive() and time.monotonic() < deadline:  # again and again: it may only just be starting
            with _patience():
                if (own := self._own()) is not None and not own.stop:
                    attempt.request_stop(self.run_uri, own)
            self.thread.join(0.5)
        if self.thread.is_alive():
            log.warning("%s: did not end within %.0f s", self.run_uri, STOP_S)
        self.queue.shutdown(force=True)
        own = storage.with_retries(self.run_uri, self._own)
        if self._record().outcome == "stopped" and own is not None:
            # The study has decided so; for the run itself it was the end of a process.
            assert self.run.mlflow is not None
            run = tracking.RunRef(self.run.mlflow, "", own.mlflow_run_id)
            with _patience():
                tracking.end_run(run, "FINISHED", {"outcome": f"stopped early after {self.examples:,} examples"})

    def _record(self) -> Trial:
        """What the study has written down of the trial."""
        return Trial(**storage.with_retries(self.record_uri, lambda: storage.read_json(self.record_uri)))

    def _own(self) -> Attempt | None:
        """The run's attempt, if it is one of this trial's; another job may have taken the run over."""
        there = attempt.read(self.run_uri)
        if there is None or there.owner == self.before:
            return None
        self.owner = self.owner or there.owner
        return there if there.owner == self.owner else None

    def _train(self) -> None:
        try:
            self.final = train(self.run, self.part, [Validations(self.queue)])
        except BaseException as error:  # raised again, or told to the study, by the trial's own thread
            self.error = error

    def _validation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        if self.owner is None:
            with _patience():
                self._own()
        ppl = metrics["response_ppl"]
        self.best = ppl if self.best is None else min(self.best, ppl)
        self.examples = metrics["examples"]
        return {"examples": self.examples, "response_ppl": ppl, OBJECTIVE: self.best, "outcome": "running"}

    def _end(self) -> dict[str, Any]:
        end: dict[str, Any] = {"examples": self.examples, OBJECTIVE: self.best or DIVERGED, "done": True}
        if self.final is not None:
            ended = {"examples": self.final["examples"], OBJECTIVE: self.final[OBJECTIVE]}
            return end | ended | {"outcome": "finished", "final": self.final}
        if isinstance(self.error, NonFiniteLossError):
            return end | {"outcome": "diverged", "problem": str(self.error), OBJECTIVE: DIVERGED}
        if isinstance(self.error, StoppedError):
            return end | {"outcome": "running"}
        if isinstance(self.error, UsageError | RunError):
            return end | {"outcome": "failed", "problem": str(self.error)}
        assert self.error is not None
        raise self.error


@contextmanager
def _patience() -> Iterator[None]:
    """Lets storage or MLflow be away for a moment, and a run be another job's."""
    try:
        yield
    except (ArplusError, OSError) as error:
        log.warning("%s", error)
