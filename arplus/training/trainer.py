"""One training run as a Ray Train job: what its own process does before, around and after the workers' work.

What the workers do is in :mod:`arplus.training.rank`.
"""

import contextlib
import logging
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import ray.train
from ray.train import ScalingConfig, TrainingFailedError, WorkerGroupError

from arplus import cli, storage, tracking
from arplus.cluster import elastic, node, preflight, ray_private
from arplus.cluster.job import tags as job_tags
from arplus.cluster.scaling import size_workers
from arplus.config import InitConfig, TrainConfig
from arplus.data.dataset import Dataset
from arplus.errors import ArplusError, ResourceError
from arplus.runs import attempt, checkpoint
from arplus.runs.attempt import StoppedError, SupersededError
from arplus.runs.folder import FinalMetrics, RunFolder
from arplus.runs.resume import ResumePoint, find_resume_point
from arplus.tracking.run import absolute_uri
from arplus.training import failure, publish, workers
from arplus.training.context import RunContext, StudyContext
from arplus.training.footprint import run_bytes
from arplus.training.start import check_start, resolve

log = logging.getLogger(__name__)


def train(
    config: TrainConfig,
    part: StudyContext | None = None,
    callbacks: Sequence[ray.train.UserCallback] = (),
    told_to_stop: threading.Event | None = None,
) -> FinalMetrics:
    """Runs a training job on the connected Ray cluster and returns what ``final_metrics.json`` holds.

    A study says what ``part`` of it the run is, follows it through Ray Train's ``callbacks``, and sets ``told_to_stop``
    where it is to be saved and end early.

    Raises :class:`UsageError` for wrong settings or data, :class:`ResourceError` for a cluster that is too small, and
    :class:`RunError` for a run that diverged, failed too often, was stopped, or was taken over by another job.
    """
    config = resolve(config)
    dataset, scaling = _check(config, part)
    run = RunFolder(storage.join(config.storage, config.run_name))
    start = find_resume_point(config, run, dataset)
    check_start(config, dataset, new=start.checkpoint is None)
    tracked = begin_tracking(config, dataset, start, part)
    tracker = tracking.Tracker.beside(tracked, run.uri)
    status: tracking.Status | None = "FAILED"

    def stop() -> None:
        with contextlib.suppress(SupersededError):  # another job's run is not ours to stop
            run.request_stop(job.attempt)
            tracker.mark("KILLED")  # now: `ray job stop` gives three seconds, perhaps too few for what follows

    try:
        run.config.write(config)
        if start.checkpoint is None:  # the audit of attempts that came to nothing
            run.delete_audit()
        job = RunContext(
            config=config,
            run_uri=run.uri,
            tracked=tracked,
            attempt=run.take_over(tracked.run_id),
            start=start.checkpoint,
            progress_bar=ray_private.progress_bar(config.run_name) if part is None and sys.stderr.isatty() else None,
            versions=node.versions(),
            part=part,
        )
        _log_inputs(tracker, config, run, dataset)
        kept = elastic.reserve_room() if len(config.world_sizes) > 1 else contextlib.nullcontext()
        with attempt.on_stop_signal(stop, told_to_stop), kept:
            final = _run_workers(job, scaling, callbacks)
        model = _log_results(tracker, job, dataset, final)
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit):  # the latter is what Ray makes of `ray job stop`
        status = "KILLED"
        raise
    except SupersededError:
        status = None  # the MLflow run is the other job's now
        raise
    except Exception as error:
        status = _say_why(tracker, config, dataset, error)
        raise
    finally:
        if (missing := tracker.close(status)) == 0:
            shutil.rmtree(publish.copies(tracker), ignore_errors=True)
    if model and config.register:
        _register(job, final, model, missing)
    return final


def summarise(config: TrainConfig, final: FinalMetrics) -> dict[str, str | None]:
    """Where a finished run's best checkpoint and its MLflow page are, and the command that evaluates it."""
    stored = storage.absolute(config.storage)
    uri, mlflow = storage.join(stored, final.run_name), config.mlflow or tracking.default_uri(stored)
    page = model = None
    with contextlib.suppress(ArplusError):  # a server that has gone away has been warned of
        if (page := tracking.find_run(mlflow, final.mlflow_run_id)) and config.register:
            model = tracking.registered(page, config.register)
    return {
        "checkpoint": checkpoint.find(uri),
        "model": model,
        "MLflow": page and tracking.run_url(page),
        "served by": tracking.open_command(mlflow),
        "next": cli.next_job("jobs/evaluate.py", checkpoint=uri, data=config.data),
    }


def _say_why(tracker: tracking.Tracker, config: TrainConfig, dataset: Dataset, error: Exception) -> tracking.Status:
    """Says on the run's page why it ended; its status."""
    tracker.set_tags({tracking.NOTE: publish.describe(config, dataset, tracker.run, error=error)})
    if isinstance(error, StoppedError):
        return "KILLED"
    tracker.set_tags(failure.tags(error))
    return "FAILED"


def _register(job: RunContext, final: FinalMetrics, model: publish.Model, missing: int) -> None:
    ppl = final.best_response_ppl if job.config.objective.lambda0 else None  # else it is of the other task
    tags = {"run": final.run_name, "response_ppl": "not measured" if ppl is None else f"{ppl:.4f}"}
    try:
        publish.register(job.tracked, model, str(job.config.register), None, tags, missing)
    except ArplusError as error:
        log.warning("the model is not registered in MLflow: %s; the same command again registers it", error)


def _check(config: TrainConfig, part: StudyContext | None) -> tuple[Dataset, ScalingConfig]:
    """The data set, and the workers that the cluster has room for."""
    # A study has read the data before; anyone else is to hear at once where it cannot be.
    dataset = storage.with_retries(config.data, Dataset.open, config.data) if part else Dataset.open(config.data)
    dataset.check_labels(config.model)
    scaling = size_workers(config)
    if part is None:  # a study has asked for all its runs
        preflight.check_nodes(config, dataset, run_bytes(config, dataset.sizes))
    if not dataset.split("valid").examples:
        log.warning(
            "--data %s: has no validation example, so no checkpoint can be the best one: the run's last one "
            "takes its place; to have one, prepare the data with a larger --valid",
            config.data,
        )
    fresh = config.init_from is None and config.init == InitConfig() and config.resume in ("auto", "never")
    if config.optimizer.only and fresh:
        log.warning(
            "--optimizer.only without --init-from: the other components keep their random start, and since ReZero's "
            "gates start closed, next to nothing is learnt"
        )
    return dataset, scaling


def begin_tracking(
    config: TrainConfig, dataset: Dataset, start: ResumePoint, part: StudyContext | None
) -> tracking.RunRef:
    """The MLflow run. Raises :class:`ResourceError` for a new run whose server does not answer; a study's waits for it.

    A run that goes on, perhaps by night and by itself, does not wait for its server: what is not sent is recorded.
    """
    uri = config.mlflow or tracking.default_uri(config.storage)

    def begin() -> tracking.RunRef:
        return tracking.start_run(
            uri,
            config.experiment,
            config.run_name,
            tags={"preset": config.preset, "fingerprint": dataset.fingerprint}
            | (part.tags if part else job_tags(config.tag)),
            params=publish.params(config),
            parent_run_id=part.parent_run_id if part else None,
            resume_run_id=start.mlflow_run_id,
        )

    try:
        # A study's server has answered before, and its next run would find it no better.
        return storage.with_retries(uri, begin) if part and start.mlflow_run_id is None else begin()
    except ResourceError as error:
        if start.mlflow_run_id is None:
            raise
        log.warning("going on without MLflow until it answers: %s", error)
        return tracking.RunRef(absolute_uri(uri), "", start.mlflow_run_id)


def _log_inputs(tracker: tracking.Tracker, config: TrainConfig, run: RunFolder, dataset: Dataset) -> None:
    """The settings, and which data it is, with its card."""
    tracker.set_tags({tracking.NOTE: publish.describe(config, dataset, tracker.run)})
    tracker.log_text(run.config.name, run.config.text(config))
    tracker.log_dataset(Path(config.data).name, dataset.fingerprint, config.data, "training")
    card = storage.join(config.data, "data_card.html")
    if page := storage.with_retries(card, storage.find_bytes, card):
        tracker.log_text("data_card.html", page.decode())


def _log_results(
    tracker: tracking.Tracker, job: RunContext, dataset: Dataset, final: FinalMetrics
) -> publish.Model | None:
    """The final metrics, here and in MLflow, and there what a run that is no part of a study found, and its model."""
    run, model = RunFolder(job.run_uri), None
    run.final.write(final)
    tracker.log_text(run.final.name, run.final.text(final))
    if job.part is None:
        try:
            model = storage.with_retries(run.uri, publish.log_best, tracker, run.uri, dataset, new=job.start is None)
        except ArplusError as error:  # the run is complete
            log.warning(
                "the model is not among the run's artifacts in MLflow: %s; the same command again sends it", error
            )
    said = publish.describe(job.config, dataset, tracker.run, final, model=model, last=run.read_attempt())
    tracker.set_tags({tracking.NOTE: said})
    return model


def _run_workers(job: RunContext, scaling: ScalingConfig, callbacks: Sequence[ray.train.UserCallback]) -> FinalMetrics:
    """Runs the workers to the end of the run, starting them again where one dies; rank 0's final metrics."""
    config = job.config
    try:
        outcome = workers.run(
            _worker,
            {"job": job},
            scaling,
            job.run_uri,
            timeout_minutes=config.collective_timeout_minutes,
            max_failures=config.max_failures,
            callbacks=[*callbacks, failure.FailureNotes(job.run_uri, job.attempt)],
        )
    except TrainingFailedError as error:
        log.error("%s", error)
        last = RunFolder(job.run_uri).read_attempt()
        facts, said = {}, f"Ray Train ended it ({failure.reason(error)})"
        if isinstance(error, WorkerGroupError):
            facts = last.failure if last and last.failed else failure.describe(error.worker_failures, ())
            said = (
                f"its workers failed once more than --max-failures {config.max_failures} allows "
                f"(the last time {failure.sentence(facts)})"
            )
        said = f"run {config.run_name}: {said}; the same command goes on from the newest checkpoint"
        raise failure.WorkersFailedError(said, facts) from error
    if isinstance(outcome, Exception):
        raise outcome
    return cast(FinalMetrics, outcome)


def _worker(arguments: dict[str, Any]) -> FinalMetrics | Exception:
    """What runs in every Ray Train worker. Rank 0's return value is the job's."""
    # Here, since this module is also imported by the job's own process and by Ray Train's controller.
    from arplus.training import rank

    job: RunContext = arguments["job"]
    return rank.run(job)
