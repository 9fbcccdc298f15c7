"""Which checkpoints of a run stay: while it trains, and what a study leaves of one that has ended.

A study asks for the latter when a trial ends (``study/trial.py``, ``study/execute.py``) and at its own end
(``study/record.py``).
"""

from typing import Literal

import safetensors.torch

from arplus import storage
from arplus.runs import checkpoint
from arplus.runs.checkpoint import MANIFEST, MOMENTS

Keep = int | Literal["all"]
"""Newest checkpoints that stay beside the best one."""


def retain(run_uri: str, newest: Keep, *, attempt: int) -> None:
    """Deletes all checkpoints of a run but the ``newest`` complete ones and the best; saves that died go as well.

    What a later attempt than ``attempt`` has begun to write has not died.
    """
    best, _ = checkpoint.marked_best(run_uri)
    kept = None if best is None else best.checkpoint
    complete = checkpoint.list_complete(run_uri)
    incomplete = sorted(checkpoint.folders(run_uri).keys() - set(complete))
    old = [] if newest == "all" else complete[:-newest]
    for uri in [uri for uri in incomplete if checkpoint.age(uri)[0] <= attempt] + old:
        if uri != kept:
            checkpoint.delete(uri)


def keep_best_weights(run_uri: str) -> None:
    """Leaves a run that has ended, if it has any, its best checkpoint alone, without optimizer state.

    One that dies in between leaves a checkpoint that can be read, and can be done again.
    """
    if not checkpoint.list_complete(run_uri):
        return
    kept = checkpoint.find(run_uri)
    for uri in checkpoint.folders(run_uri):
        if uri != kept:
            checkpoint.delete(uri)
    manifest_uri, empty = storage.join(kept, MANIFEST), safetensors.torch.save({})
    manifest = storage.read_json(manifest_uri)
    if manifest["files"][MOMENTS] != checkpoint.describe(empty):
        storage.write_bytes(storage.join(kept, MOMENTS), empty)
        manifest["files"][MOMENTS] = checkpoint.describe(empty)
        storage.write_json(manifest_uri, manifest)


def delete_all(run_uri: str) -> None:
    """Deletes all of a run's checkpoints; what it came to, its settings and its records stay."""
    for uri in checkpoint.folders(run_uri):
        checkpoint.delete(uri)
