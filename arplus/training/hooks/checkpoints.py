"""Checkpoints, and the audit of what they cover."""

import time
from dataclasses import replace

import torch.distributed as dist

from arplus import storage
from arplus.data.dataset import Dataset
from arplus.data.loader import Step
from arplus.runs import attempt
from arplus.runs.attempt import Attempt
from arplus.runs.audit import Audit
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.training.context import RunContext, RunEndedError
from arplus.training.engine import Engine
from arplus.training.hooks.base import Hook, Request
from arplus.training.saver import Saver


class AuditTrail(Hook):
    """Notes which examples each step trained on; every worker's, and before :class:`Checkpoints` in the list."""

    def __init__(self, run_uri: str, attempt: int) -> None:
        self.audit = Audit(run_uri, attempt, dist.get_rank())

    def after_step(self, progress: TrainProgress, step: Step) -> None:
        """Notes the step's examples."""
        self.audit.add(progress.epoch, progress.epoch_step, step)

    def on_checkpoint(self, progress: TrainProgress) -> None:
        """Writes them; every worker's rows are durable before the checkpoint that covers them."""
        storage.with_retries(self.audit.run_uri, self.audit.flush)


class Checkpoints(Hook):
    """Gathers the train state on all workers and has rank 0's saver write it, at the latest after some minutes."""

    def __init__(
        self, job: RunContext, mine: Attempt, engine: Engine, dataset: Dataset, started_from: str | None
    ) -> None:
        """``started_from`` is the URI of the checkpoint that the run goes on from."""
        self.job = job
        self.engine = engine
        self.dataset = dataset
        self.improved = False
        self.saved_at = time.monotonic()
        self.saver: Saver | None = None
        if dist.get_rank() == 0:
            self.saver = Saver(
                job.run_uri,
                attempt=mine.number,
                keep=job.config.keep_checkpoints,
                check=lambda: attempt.check(job.run_uri, mine),
            )
            self.saver.newest = started_from

    @property
    def last_checkpoint(self) -> str | None:
        """URI of the newest checkpoint; rank 0 knows it."""
        if self.saver is None:
            return None
        self.saver.wait()
        return self.saver.newest

    def request(self) -> Request:
        """Asks for a checkpoint because of the time, and for the end where none can be written."""
        if self.saver is not None and self.saver.error:
            return Request.END
        minutes = self.job.config.checkpoint_minutes
        due = minutes is not None and time.monotonic() - self.saved_at >= 60 * minutes
        return Request.SAVE if due else Request.NOTHING

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Notes whether the next checkpoint is the best one."""
        self.improved = not progress.validations_since_best

    def on_checkpoint(self, progress: TrainProgress) -> None:
        """Gathers the train state; rank 0's saver does the rest."""
        weights, moments = self.engine.weights(), self.engine.moments()
        dist.barrier()  # what other hooks wrote for this checkpoint is durable on every worker
        if self.saver is not None:
            state = TrainState(
                config=self.job.config,
                progress=replace(progress),
                schedule=self.engine.schedule.state(),
                rules=self.dataset.rules,
                characters=self.dataset.characters,
                persona_words=self.dataset.persona_words,
                weights=weights,
                moments=moments,
                mlflow_run_id=self.job.tracked.run_id,
            )
            self.saver.save(state, progress.best_response_ppl if self.improved else None)
        self.improved = False
        self.saved_at = time.monotonic()

    def finish(self) -> None:
        """Waits for the last checkpoint, and raises where it could not be written."""
        if self.saver is not None:
            self.saver.wait()
            if self.saver.error:
                raise RunEndedError(self.saver.error)

    def close(self) -> None:
        """Lets a checkpoint that is being written end."""
        if self.saver is not None:
            self.saver.wait(timeout=60)
