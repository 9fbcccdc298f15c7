"""What a run does around its loop: log lines, tracking, the audit, checkpoints, and what rank 0 watches for."""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray.train
import torch.distributed as dist

from arplus import storage, tracking
from arplus.cluster import ray_private
from arplus.config import TrainConfig
from arplus.data.dataset import Dataset
from arplus.data.loader import Step
from arplus.runs import attempt
from arplus.runs.attempt import Attempt, StoppedError, Watch
from arplus.runs.audit import Audit
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.training.engine import Engine
from arplus.training.loop import Control, Hooks, describe, memory_bytes
from arplus.training.saver import Saver

log = logging.getLogger(__name__)

LOOK_S = 10.0
"""Seconds between two questions whether a node is to be taken away; each one is a barrier of all workers."""


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """What a run that is a part of a study has from it. Such a run says nothing but warnings, and keeps its model."""

    parent_run_id: str
    """MLflow run of the study."""
    tags: dict[str, str]
    """Tags of the run's own MLflow run."""
    side_by_side: int = 1
    """Runs that share the machine's cores."""


@dataclass(frozen=True, kw_only=True)
class RunContext:
    """What every worker of a run is given."""

    config: TrainConfig
    run_uri: str
    tracked: tracking.RunRef
    attempt: Attempt
    """The job's ownership of the run, before its workers' first start."""
    start: str | None
    """Checkpoint from which the job starts; None for the beginning."""
    progress_bar: bool
    versions: dict[str, str]
    """Those of the job's own node, which every worker's must equal (:func:`arplus.cluster.node.versions`)."""
    part: StudyContext | None = None
    """Of which study the run is a part, if it is of one."""

    @property
    def record(self) -> Path:
        """The local JSONL record of what is tracked: in the run's folder, a temporary one where that is remote."""
        return tracking.record_of(self.tracked, self.run_uri)

    @property
    def records(self) -> str | None:
        """Where a record that MLflow lacks a part of is kept, for a run whose folder is remote."""
        return tracking.keep_of(self.run_uri)


class RunEndedError(Exception):
    """Raised on all workers at the same place: the run ends here, and starting the workers again would not help.

    ``args[0]`` is the reason on rank 0, an error of ours; other workers may have None.
    """


class RunHooks(Hooks):
    """The hooks of a run. Files and tracking are rank 0's, but for the audit; saving needs all workers."""

    def __init__(
        self, job: RunContext, mine: Attempt, engine: Engine, dataset: Dataset, steps: int, started_from: str | None
    ) -> None:
        self.job = job
        self.engine = engine
        self.dataset = dataset
        self.steps = steps
        self.improved = False
        self.lost_nodes: list[str] = []
        self.saved_at = self.looked_at = time.monotonic()
        self.audit = Audit(job.run_uri, mine.number, dist.get_rank()) if job.config.audit else None
        self.bar = self.tracker = self.saver = self.watch = None
        if dist.get_rank() == 0:
            self.tracker = tracking.Tracker(job.tracked, record=job.record, keep=job.records)
            self.tracker.set_tags({"attempts": str(mine.number)})
            self.watch = Watch(job.run_uri, mine)
            self.saver = Saver(
                job.run_uri,
                attempt=mine.number,
                keep=job.config.keep_checkpoints,
                check=lambda: attempt.check(job.run_uri, mine),
            )
            self.saver.newest = started_from
            if job.progress_bar:
                self.bar = ray_private.progress_bar(steps, job.config.run_name)

    @property
    def last_checkpoint(self) -> str | None:
        """URI of the newest checkpoint; rank 0 knows it."""
        if self.saver is None:
            return None
        self.saver.wait()
        return self.saver.newest

    def ask(self) -> Control:
        """What rank 0 asks for: an end, a checkpoint because of the time, a look at the nodes."""
        if self.saver is None or self.watch is None:
            return Control.NOTHING
        if self.saver.error or self.watch.error or self.watch.stop:
            return Control.END
        asked, now, minutes = Control.NOTHING, time.monotonic(), self.job.config.checkpoint_minutes
        if minutes is not None and now - self.saved_at >= 60 * minutes:
            asked |= Control.SAVE
        if now - self.looked_at >= LOOK_S:
            self.looked_at = now
            asked |= Control.LOOK
        return asked

    def wants_checkpoint(self, asked: Control) -> bool:
        """Whether rank 0 asks for a checkpoint, or a node is to be taken away (once a node)."""
        if Control.LOOK in asked and (info := ray.train.get_preemption_info()) is not None:
            lost, self.lost_nodes = self.lost_nodes, info.preempted_node_ids
            if lost != self.lost_nodes:
                if self.saver is not None:
                    log.warning("nodes %s are to be taken away: saving now", ", ".join(self.lost_nodes))
                return True
        return super().wants_checkpoint(asked)

    def on_step(self, progress: TrainProgress, step: Step) -> None:
        """Notes the step's examples for the audit."""
        if self.audit is not None:
            self.audit.add(progress.epoch, progress.epoch_step, step)

    def on_log(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Writes the log line and tracks the metrics."""
        if self.tracker is None:
            return
        if self.job.part is None:
            log.info(describe(progress, metrics, self.steps))
        self.tracker.log(metrics, step=progress.examples)
        if self.bar is not None:
            self.bar.update(progress.step - self.bar.n)

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Notes the metrics and whether they are the best, and reports them to Ray Train."""
        progress.validation = metrics
        best = progress.best_response_ppl
        self.improved = best is None or metrics["response_ppl"] < best
        if self.improved:
            progress.best_response_ppl = metrics["response_ppl"]
        if self.tracker is not None:
            if self.job.part is None:
                log.info(
                    "validation at step %d: response PPL %.3f%s, L_LM %.4f, %d examples",
                    progress.step,
                    metrics["response_ppl"],
                    " (best)" if self.improved else "",
                    metrics["auxiliary_loss"],
                    metrics["examples"],
                )
            self.tracker.log({f"valid/{k}": v for k, v in metrics.items()}, step=progress.examples)
        ray.train.report({**metrics, "step": progress.step, "examples": progress.examples})

    def checkpoint(self, progress: TrainProgress) -> None:
        """Writes the audit and gathers the train state on all workers; rank 0's saver does the rest."""
        began = time.monotonic()
        if self.audit is not None:
            storage.with_retries(self.job.run_uri, self.audit.flush)
        weights, moments = self.engine.weights(), self.engine.moments()
        dist.barrier()  # every worker's rows are durable before the checkpoint that covers them
        if self.saver is not None:
            state = TrainState(
                config=self.job.config,
                progress=replace(progress),
                schedule=self.engine.schedule_state(),
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
        if self.tracker is not None:
            stood_still = self.saved_at - began
            self.tracker.log({"perf/checkpoint_seconds": stood_still}, step=progress.examples)

    def finish(self, progress: TrainProgress) -> dict[str, Any]:
        """Waits for the last checkpoint; what a finished run leaves in ``final_metrics.json``.

        Raises :class:`RunEndedError` where a checkpoint could not be written, and where the run is not at its end.
        """
        if self.saver is not None and self.watch is not None:
            self.saver.wait()
            if error := self.watch.error or self.saver.error:
                raise RunEndedError(error)
        if progress.step < self.steps or progress.unvalidated:
            raise RunEndedError(StoppedError(f"stopped at step {progress.step}; the same command goes on from there"))
        return {
            "run_name": self.job.config.run_name,
            "preset": self.job.config.preset,
            "fingerprint": progress.fingerprint,
            "steps": progress.step,
            "examples": progress.examples,
            "best_response_ppl": progress.best_response_ppl,
            "train_seconds": progress.train_seconds,
            "peak_memory_bytes": memory_bytes(),
            "mlflow_run_id": self.job.tracked.run_id,
            **{f"valid/{k}": v for k, v in progress.validation.items()},
        }

    def close(self) -> None:
        """Lets a checkpoint that is being written end, and sends what waits; the driver ends the MLflow run itself."""
        if self.saver is not None:
            self.saver.wait(timeout=60)
        if self.watch is not None:
            self.watch.close()
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.close()
