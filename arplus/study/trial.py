"""One run of a study as a Ray Tune trial: a small process that drives a Ray Train run and passes its validations on.

A trial asks for almost nothing, since the run's workers have resources of their own; but not for zero CPUs, with which
Tune waits for ever on a small cluster (ray#54305).

It is a class, not a function. Tune ends a function by killing its process, which leaves a run's workers, its MLflow run
and its last values to chance; a class is told to stop, so that its workers save, and give back what they hold, before
the next trial starts (ray#58515).
"""

import logging
import threading
from dataclasses import replace
from typing import Any

import ray.train
from ray import tune
from ray.util.queue import Empty, Queue

from arplus import storage, tracking
from arplus.documents import Document
from arplus.errors import ArplusError, NonFiniteLossError
from arplus.runs.attempt import StoppedError
from arplus.runs.checkpoint import compared
from arplus.runs.folder import FinalMetrics, RunFolder
from arplus.study.record import OBJECTIVE, Trial
from arplus.training.context import StudyContext
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

    Its config holds ``record`` (URI of the :class:`Trial`), ``study`` (its name), ``parent_run_id``, ``tags`` of its
    job, and what a :class:`arplus.study.slots.Slots` says.
    """

    def setup(self, config: dict[str, Any]) -> None:
        """Starts the run; it goes on from its newest checkpoint where it has one."""
        self.record = Document(config["record"], Trial)
        trial = self.record.read()
        self.run = replace(trial.config, cpus_per_worker=config["cpus_per_worker"], device=config["device"])
        self.best = trial.score
        self.final: FinalMetrics | None = None
        self.error: BaseException | None = None
        self.examples = 0
        self.queue = Queue(actor_options={"num_cpus": 0})
        self.part = StudyContext(
            parent_run_id=config["parent_run_id"],
            tags={**config["tags"], "study": config["study"], "trial": trial.name},
            side_by_side=config["side_by_side"],
        )
        self.told_to_stop = threading.Event()
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
        self.told_to_stop.set()
        self.thread.join(STOP_S)
        if self.thread.is_alive():
            log.warning("%s: did not end within %.0f s", self.run.run_name, STOP_S)
        self.queue.shutdown(force=True)
        trial = self.record.read()
        if trial.kept == "best" and not self.thread.is_alive():
            RunFolder(storage.join(self.run.storage, self.run.run_name)).checkpoints.keep_best_weights()
        if trial.outcome == "stopped" and trial.mlflow_run_id is not None:
            # The study has decided so; for the run itself it was the end of a process.
            assert self.run.mlflow is not None
            run = tracking.RunRef(self.run.mlflow, "", trial.mlflow_run_id)
            try:
                tracking.end_run(run, "FINISHED", {"outcome": f"stopped early after {self.examples:,} examples"})
            except (ArplusError, OSError) as error:  # the study ends what is left open
                log.warning("%s", error)

    def _train(self) -> None:
        try:
            self.final = train(self.run, self.part, [Validations(self.queue)], self.told_to_stop)
        except BaseException as error:  # raised again, or told to the study, by the trial's own thread
            self.error = error

    def _validation(self, metrics: dict[str, Any]) -> dict[str, Any]:
        ppl = compared(metrics)
        assert ppl is not None
        self.best = ppl if self.best is None else min(self.best, ppl)
        self.examples = metrics["examples"]
        told = {name: metrics[name] for name in ("examples", "response_ppl")}
        return told | {OBJECTIVE: self.best, "outcome": "running"}

    def _end(self) -> dict[str, Any]:
        end: dict[str, Any] = {"examples": self.examples, OBJECTIVE: self.best or DIVERGED, "done": True}
        if self.final is not None:
            ended = {"examples": self.final.examples, OBJECTIVE: self.final.best_response_ppl}
            return end | ended | {"outcome": "finished"}
        if isinstance(self.error, NonFiniteLossError):
            return end | {"outcome": "diverged", "problem": str(self.error), OBJECTIVE: DIVERGED}
        if isinstance(self.error, StoppedError):
            return end | {"outcome": "running"}
        if isinstance(self.error, ArplusError):
            return end | {"outcome": "failed", "problem": str(self.error)}
        assert self.error is not None
        raise self.error
