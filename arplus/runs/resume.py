"""Where a run starts: at the beginning, or from a checkpoint of its own or of another run (``--resume``)."""

import logging
from collections.abc import Collection
from typing import NamedTuple, TypeVar

from arplus import storage
from arplus.config import Role, TrainConfig, dotted_names, flat, names_of_role
from arplus.data.dataset import Dataset
from arplus.errors import UsageError
from arplus.runs import checkpoint
from arplus.runs.checkpoint import TrainState
from arplus.runs.folder import RunFolder

log = logging.getLogger(__name__)

T = TypeVar("T")

MAY_DIFFER = frozenset(names_of_role(TrainConfig, Role.OPERATION, Role.BUDGET))
"""Settings that may change in mid-run; any other would make it a different run. Data is known by its fingerprint."""
STARTS = frozenset(name for name in dotted_names(TrainConfig) if name.startswith(("init.", "init_from")))
"""What says where weights come from; that of another run does not matter to one that starts from its checkpoint."""


class ResumePoint(NamedTuple):
    """Where a run starts."""

    checkpoint: str | None
    """URI of the checkpoint; None for the beginning."""
    mlflow_run_id: str | None
    """MLflow run to go on with; None for a new one."""


def find_resume_point(config: TrainConfig, run: RunFolder, dataset: Dataset) -> ResumePoint:
    """Where ``config``, with its names and paths filled in, starts.

    Raises :class:`UsageError` for a run of this name where --resume forbids one, and for a checkpoint of other
    settings (which are listed) or other data.
    """
    if config.resume == "auto":
        return _auto(config, run, dataset)
    started = run.config.exists() or bool(run.checkpoints.list_complete())
    if config.resume == "never":
        if started:
            raise UsageError(
                f"--resume never: {run.uri} exists; take another --run-name, or --resume auto to go on with it"
            )
        return ResumePoint(None, None)
    own = run.holds(config.resume)
    if started and not own:
        before = run.config.find()
        if before is None or before.resume != config.resume:
            raise UsageError(
                f"--resume {config.resume}: {run.uri} exists and is another run; take another --run-name, or --resume "
                "auto to go on with it"
            )
        if run.checkpoints.list_complete():  # the same command again
            return _auto(config, run, dataset)
    brought = {
        "init-from": config.init_from,
        "init.character-vectors": config.init.character_vectors,
        "init.pretrained": config.init.pretrained,
    }
    for name, given in brought.items():
        if given is not None:
            raise UsageError(f"--{name}: contradicts --resume {config.resume}, which brings the weights; leave one out")
    return _from_checkpoint(config, dataset, own)


def _auto(config: TrainConfig, run: RunFolder, dataset: Dataset) -> ResumePoint:
    found = run.checkpoints.newest()
    if found is not None:
        uri, state = found
        _check(state, config, dataset, run.uri, MAY_DIFFER)
        log.info("going on with run %s from step %d", config.run_name, state.progress.step)
        return ResumePoint(uri, state.mlflow_run_id)
    _refuse_what_is_there(run)
    before = run.read_attempt()
    theirs = run.config.find() if before else None
    if before is None or theirs is None:
        return ResumePoint(None, None)
    log.info("run %s has no checkpoint yet: it starts from the beginning", config.run_name)
    return ResumePoint(None, None if find_differences(theirs, config, MAY_DIFFER) else before.mlflow_run_id)


def _from_checkpoint(config: TrainConfig, dataset: Dataset, own: bool) -> ResumePoint:
    uri = config.resume
    other = RunFolder(uri)
    if storage.with_retries(uri, checkpoint.is_complete, uri):
        state = storage.with_retries(uri, checkpoint.load, uri, moments=True)
    elif (found := other.checkpoints.newest()) is not None:
        uri, state = found
    else:
        _refuse_what_is_there(other)
        raise UsageError(f"--resume {uri}: must be auto, never, or the URI of a checkpoint or of a run's folder")
    # Another run may have been tracked elsewhere, and its checkpoint has what its weights came to.
    _check(state, config, dataset, uri, MAY_DIFFER | STARTS | {"experiment"})
    steps = config.total_steps(dataset.split("train", config.feed.max_examples).examples)
    if not own and state.progress.step >= steps:
        raise UsageError(
            f"--resume {uri}: is of step {state.progress.step}, and a run of these settings has {steps} steps: raise "
            "--epochs or --max-steps, or take an earlier checkpoint"
        )
    log.info("run %s starts from step %d of %s", config.run_name, state.progress.step, uri)
    if own:
        log.info("the same command would begin there again; --resume auto goes on with what is trained now")
    return ResumePoint(uri, state.mlflow_run_id if own else None)


def _refuse_what_is_there(run: RunFolder) -> None:
    """Raises :class:`UsageError` with what is wrong with the newest checkpoint of a run that has no whole one."""
    if complete := run.checkpoints.list_complete():
        try:
            storage.with_retries(run.uri, checkpoint.load, complete[-1])
        except UsageError as error:
            raise UsageError(f"{run.uri}: no checkpoint can be read ({error}); take another --run-name") from None


def find_differences(theirs: T, mine: T, may_differ: Collection[str]) -> list[str]:
    """The settings in which two configurations differ and must not, with both values."""
    there, here = flat(theirs), flat(mine)
    differ = [name for name in here if name not in may_differ and there[name] != here[name]]
    return [f"{name}: {there[name]!r} there, {here[name]!r} here" for name in differ]


def _check(state: TrainState, config: TrainConfig, dataset: Dataset, what: str, may_differ: frozenset[str]) -> None:
    if state.progress.fingerprint != dataset.fingerprint:
        raise UsageError(
            f"{what}: this run trained on data of fingerprint {state.progress.fingerprint}, and {config.data} has "
            f"{dataset.fingerprint}; take another --run-name"
        )
    if state.progress.step and not state.moments:
        raise UsageError(f"{what}: holds weights alone; --init-from starts a run of another --run-name from them")
    if different := find_differences(state.config, config, may_differ):
        raise UsageError(f"{what}: this run has other settings ({'; '.join(different)}); take another --run-name")
