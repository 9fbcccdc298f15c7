"""What a run does around its loop: a list of hooks, each with one job; the loop knows none of them by name.

Modules: ``base`` (what a hook may do) · ``console`` · ``reports`` (MLflow and Ray Train) · ``checkpoints`` (with the
audit) · ``requests`` (stop, preemption, early stopping) · ``profiler``.
A new one is a class of :class:`Hook` and a line in :func:`make_hooks`.
"""

import contextlib
import time

import torch.distributed as dist

from arplus import tracking
from arplus.data.dataset import Dataset
from arplus.runs.attempt import Attempt, StoppedError
from arplus.runs.checkpoint import TrainProgress
from arplus.runs.folder import FinalMetrics
from arplus.training.context import RunContext, RunEndedError
from arplus.training.engine import Engine
from arplus.training.failure import sentence
from arplus.training.hooks.base import Hook
from arplus.training.hooks.checkpoints import AuditTrail, Checkpoints
from arplus.training.hooks.console import Console, ProgressBar
from arplus.training.hooks.profiler import Profiler
from arplus.training.hooks.reports import Mlflow, RayReports, SystemMetrics
from arplus.training.hooks.requests import EarlyStopping, Preemption, StopRequests
from arplus.training.meter import memory_bytes


def make_hooks(
    job: RunContext, mine: Attempt, engine: Engine, dataset: Dataset, steps: int, started_from: str | None
) -> list[Hook]:
    """The hooks of a run of so many steps on this worker, in the order in which they are called.

    Those whose work needs all workers are on all of them. Files, tracking and clocks are rank 0's, but for the audit.
    """
    config, is_first = job.config, dist.get_rank() == 0
    hooks: list[Hook] = []
    if is_first:
        tracker = tracking.Tracker.beside(job.tracked, job.run_uri)
        tracker.set_tags({"attempts": str(mine.number)})
        if mine.restarted_by_failure:
            when = time.strftime("%F %T UTC", time.gmtime())
            tracker.set_tags({f"restart.{mine.number}": f"{when}, after {sentence(mine.failure)}"})
        hooks += [StopRequests(job.run_uri, mine)]
        if job.part is None:
            hooks += [Console(steps)]
        if job.progress_bar is not None:
            hooks += [ProgressBar(job.progress_bar, steps)]
        if profiled := config.profiled_steps:
            hooks += [Profiler(profiled, job.run_uri, tracker)]
    hooks += [Preemption()]
    if config.patience is not None:
        hooks += [EarlyStopping(config.patience)]
    if config.audit:
        hooks += [AuditTrail(job.run_uri, mine.number)]
    hooks += [Checkpoints(job, mine, engine, dataset, started_from)]
    if is_first:
        hooks += [SystemMetrics(tracker), Mlflow(tracker)]
    return [*hooks, RayReports()]


def final_metrics(job: RunContext, progress: TrainProgress, steps: int, hooks: list[Hook]) -> FinalMetrics:
    """Waits for what still runs; what a finished run leaves in ``final_metrics.json``.

    Raises :class:`RunEndedError` where a checkpoint could not be written, and where the run is not at its end.
    """
    for hook in hooks:
        hook.finish()
    stopped_early = any(hook.is_over(progress) for hook in hooks)
    if progress.unvalidated or (progress.step < steps and not stopped_early):
        raise RunEndedError(StoppedError(f"stopped at step {progress.step}; the same command goes on from there"))
    return FinalMetrics(
        run_name=job.config.run_name,
        preset=job.config.preset,
        fingerprint=progress.fingerprint,
        steps=progress.step,
        examples=progress.examples,
        stopped_early=progress.step < steps,
        best_response_ppl=progress.best_response_ppl,
        train_seconds=progress.train_seconds,
        peak_memory_bytes=memory_bytes(),
        mlflow_run_id=job.tracked.run_id,
        valid=progress.validation,
    )


def close_hooks(hooks: list[Hook]) -> None:
    """Has every hook let go of what it holds, in their order, also where one of them fails."""
    with contextlib.ExitStack() as stack:
        for hook in reversed(hooks):
            stack.callback(hook.close)
