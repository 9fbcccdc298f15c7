"""Where an evaluation's metrics go, which is asked before the work: a JSON file, and the training run's MLflow run."""

import logging
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arplus import storage, tracking
from arplus.cluster import job
from arplus.config import EvaluateConfig
from arplus.errors import ResourceError
from arplus.evaluation.evaluate import GROUPS
from arplus.runs import checkpoint
from arplus.tracking.run import absolute_uri

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Destination:
    """What MLflow is to know of the checkpoint that is evaluated."""

    mlflow: str
    """Tracking URI."""
    run_id: str | None
    """The training's MLflow run; None for a checkpoint that has none, such as an export."""
    experiment: str
    run_name: str
    examples: int
    """Examples that the checkpoint was trained on: the step of its metrics."""
    records: str | None
    """Folder for the record of what MLflow misses: beside the checkpoint, where training keeps its own; else here."""


def destination(config: EvaluateConfig) -> Destination:
    """Where the metrics will go.

    Raises :class:`UsageError` or :class:`ResourceError` where MLflow does not answer, or --json or --replies cannot be
    written.
    """
    with tracking.fetched(config.checkpoint, config.mlflow) as folder:
        state = checkpoint.load(folder)
    mlflow = (
        tracking.server_of(config.checkpoint, config.mlflow)
        or state.config.mlflow
        or tracking.default_uri(state.config.storage)
    )
    tracking.check_reachable(mlflow)
    for file in filter(None, (config.json, config.replies)):
        storage.check_writable(file)
    return Destination(
        mlflow=mlflow,
        run_id=state.mlflow_run_id,
        experiment=state.config.experiment or "arplus",  # a checkpoint of the paper code's weights has neither
        run_name=state.config.run_name or state.config.preset,
        examples=state.progress.examples,
        records=None
        if tracking.is_model_uri(config.checkpoint)
        else storage.join(storage.absolute(config.checkpoint), "tracking"),
    )


def deliver(result: dict[str, Any], config: EvaluateConfig, to: Destination) -> str | None:
    """Writes the metrics to the JSON file and to MLflow; where one of them fails, the other has them all the same.

    Gives the address of their page, if MLflow says which it is.
    """
    try:
        if config.json is not None:
            storage.with_retries(config.json, storage.write_json, config.json, result)
    finally:
        run = track(result, to)
    return tracking.run_url(run) if run.experiment_id else None


def track(result: dict[str, Any], to: Destination) -> tracking.RunRef:
    """Logs the metrics to the MLflow run that trained the checkpoint, as ``test/standard/bleu`` and so on.

    Where its server has gone away meanwhile, they stay in a record, and a warning says how to send them.
    """
    run = _run(to)
    record = Path(tempfile.mkdtemp(prefix="arplus-evaluation-"), "tracking.jsonl")
    # Of two evaluations MLflow shows the later one; their settings, such as the temperature, are in the artifact.
    tracker = tracking.Tracker(run, record=record, keep=to.records, repeats=True)
    for name, found in result["splits"].items():
        metrics = {f"{name}/{group}/{k}": v for group in GROUPS for k, v in found.get(group, {}).items()}
        tracker.log(metrics, step=to.examples)
    names = "_".join(result["splits"])
    tracker.log_text(f"evaluation_{names}.json", storage.as_json(result))
    # The training's own run keeps its status: it may have failed, or go on.
    if tracker.close(None if run.run_id == to.run_id else "FINISHED") == 0:
        shutil.rmtree(record.parent)
    return run


def _run(to: Destination) -> tracking.RunRef:
    """The training's run, or one of the evaluation's own."""
    try:
        if to.run_id and (found := tracking.find_run(to.mlflow, to.run_id)):
            return found
        said = f"Evaluation of a checkpoint of `{to.run_name}`, whose own run is not here; the artifact says which."
        tags = job.tags() | {"kind": "evaluation", tracking.NOTE: said}
        return tracking.start_run(to.mlflow, to.experiment, to.run_name, tags=tags, params={})
    except ResourceError as error:
        if to.run_id is None:
            raise
        log.warning("%s", error)
        return tracking.RunRef(absolute_uri(to.mlflow), "", to.run_id)
