"""What a run's page in MLflow holds beside its curves: settings, words, sample replies, and the model, which loads.

The model is the run's artifact :data:`ARTIFACT`: a checkpoint without the optimizer's moments, so that every job takes
it by ``runs:/`` or ``models:/``, and beside it what makes it one of ``mlflow.pyfunc``
(:mod:`arplus.evaluation.served`).
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from arplus import storage, tracking
from arplus.cluster import node
from arplus.config import PRESETS, TrainConfig, flat
from arplus.data.dataset import Dataset
from arplus.errors import ArplusError, ResourceError
from arplus.evaluation.replies import sample_replies
from arplus.evaluation.served import FLAVOR
from arplus.runs import checkpoint
from arplus.runs.attempt import Attempt, StoppedError
from arplus.runs.folder import FinalMetrics
from arplus.training import failure

ARTIFACT = "checkpoint"
"""Folder of the model among a run's artifacts, unless another one is registered there."""


class Model(NamedTuple):
    """A checkpoint among a run's artifacts."""

    artifact: str
    """Its folder there."""
    checkpoint: str
    """Its folder's name in the run."""


_SHOWN = ("preset", "seed", "batch_size", "epochs", "optimizer.lr", "objective.lambda1", "workers")
"""Settings that are a run's params in any case."""
_ELSEWHERE = ("data", "storage", "run_name", "experiment", "mlflow", "resume", "register", "tag")
"""Settings that a page shows otherwise, or that say nothing of the run."""


def params(config: TrainConfig) -> dict[str, Any]:
    """A run's params in MLflow: what one compares, and what is not as the preset has it; config.json holds all.

    All of them would be 60 columns of a table, nearly all of them equal.
    """
    usual = flat(PRESETS.get(config.preset, config))
    found = flat(config).items()
    return {k: v for k, v in found if k in _SHOWN or (v != usual[k] and k not in _ELSEWHERE)}


def describe(
    config: TrainConfig,
    dataset: Dataset,
    run: tracking.RunRef,
    final: FinalMetrics | None = None,
    *,
    model: Model | None = None,
    last: Attempt | None = None,
    error: Exception | None = None,
) -> str:
    """What the run is; what it found once it has ended, and where, with its model if that was sent; why it did not.

    Markdown. The ``last`` attempt may be one that a failure made.
    """
    examples = dataset.split("train", config.feed.max_examples).examples
    limit = f"{config.epochs} epochs" + (f" or {config.max_steps:,} steps" if config.max_steps else "")
    uri = storage.join(config.storage, config.run_name)
    said = (
        f"`{config.preset}` trained on `{config.data}`: {examples:,} examples, batches of {config.batch_size}, up to "
        f"{limit}, learning rate {config.optimizer.lr:g}, λ1 {config.objective.lambda1:g}. The run's "
        f"folder is `{uri}`; all settings are in [config.json]({tracking.run_url(run, 'artifacts/config.json')})."
    )
    if error is not None:
        return f"**{'Stopped' if isinstance(error, StoppedError) else 'Failed'}:** {failure.in_words(error)}.\n\n{said}"
    if final is None:
        return said
    if last is not None and last.restarted_by_failure:
        who = f"Worker {last.failure.get('rank', '?')} on {last.failure.get('node', 'an unknown node')}"
        said = f"{who} failed, and all were started again: the tag `restart.{last.number}` says why.\n\n{said}"
    ppl = "not measured" if final.best_response_ppl is None else f"{final.best_response_ppl:.3f}"
    said = (
        f"**{config.objective.compared} on validation: {ppl}**, the lowest of a run of {final.examples:,} examples in "
        f"{final.train_seconds / 60:.1f} minutes{' that --patience ended' if final.stopped_early else ''}.\n\n{said}"
    )
    if model is None:
        return said
    return (
        f"{said}\n\nThe best checkpoint is [a model]({tracking.run_url(run, f'artifacts/{model.artifact}')}) of "
        f"MLflow's, and `runs:/{run.run_id}/{model.artifact}` to `jobs/chat.py` and others; "
        f"[some of its replies]({tracking.run_url(run, 'artifacts/sample_replies.txt')})."
    )


def log_best(tracker: tracking.Tracker, run_uri: str, dataset: Dataset, *, new: bool = True) -> Model:
    """Sample replies of the best checkpoint, and the checkpoint itself as a model, as artifacts of the run.

    A run that is not ``new`` may have registered another checkpoint, which stays as it is beside this one.
    """
    found, state = checkpoint.load_found(run_uri)
    tracker.log_text("sample_replies.txt", sample_replies(state, dataset))
    facts = {"arplus": node.versions()["arplus"], "checkpoint": found, "preset": state.config.preset}
    model = Model(ARTIFACT if new else _artifact_of(tracker.run, found), found.rpartition("/")[2])
    folder = storage.join(str(copies(tracker)), model.artifact)
    checkpoint.write(folder, replace(state, moments={}), tracking.flavor_files(FLAVOR, facts))
    for file in sorted(Path(folder).iterdir()):
        tracker.log_file(file, model.artifact)
    return model


def _artifact_of(run: tracking.RunRef, checkpoint_uri: str) -> str:
    name = checkpoint_uri.rpartition("/")[2]
    try:
        return tracking.artifact_of(run, name, ARTIFACT)
    except ArplusError:  # the run itself is at its end; a folder of its own cannot be wrong
        return f"{ARTIFACT}-{name}"


def copies(tracker: tracking.Tracker) -> Path:
    """Where files are kept until MLflow has them."""
    return tracker.record.with_suffix("")


def register(
    run: tracking.RunRef, model: Model, name: str, alias: str | None, tags: dict[str, str], missing: int
) -> str:
    """Registers what :func:`log_best` sent, and gives the model's URI; ``missing`` values did not reach MLflow.

    Raises :class:`ResourceError`. It is the last that a job does, and can be done again.
    """
    if missing:
        raise ResourceError("its files did not reach MLflow")
    load = f'`mlflow.pyfunc.load_model("models:/{name}@{alias}")`' if alias else "`mlflow.pyfunc.load_model`"
    described = (
        f"A persona-aware Chinese dialogue model (arplus). Response perplexity on validation: {tags['response_ppl']}. "
        f"{load} answers a table of context, gender, location and tags where the package arplus is installed; "
        "`jobs/chat.py`, `jobs/evaluate.py` and `jobs/export.py` take it as `--checkpoint`."
    )
    tags = tags | {"checkpoint": model.checkpoint}
    version = tracking.register_model(run, model.artifact, name, alias, tags, described)
    return f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
