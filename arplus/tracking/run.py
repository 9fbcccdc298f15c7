"""What a tracked run is, and the addresses where runs live."""

import contextlib
import json
import os
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from arplus import storage
from arplus.errors import NO_CREDENTIALS, UsageError, mask, redact, server_problem
from arplus.process import own_folder

_TRAINING = "workflowType=machine_learning"
"""Opens MLflow's pages for model training. By default they are those of agents, whatever the experiment's tag says, as
seen in 3.17; the browser remembers what was opened last."""


NOTE = "mlflow.note.content"
"""The tag that is a page's description, in Markdown."""


class RunRef(NamedTuple):
    """One MLflow run, as plain values that travel to the workers and into checkpoints."""

    uri: str
    experiment_id: str
    run_id: str


def default_uri(storage_uri: str) -> str:
    """``MLFLOW_TRACKING_URI`` where it is set, else a sqlite file ``mlflow.db`` under the storage folder.

    Raises :class:`UsageError` for storage that is not a local folder, as a sqlite file cannot live in a bucket, and for
    an address with a password in it, since it will be written down.
    """
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        if mask(uri) != uri:
            raise UsageError(f"MLFLOW_TRACKING_URI={mask(uri)}: {NO_CREDENTIALS}")
        return uri
    if not storage.is_local(storage_uri):
        raise UsageError(
            f"--storage {storage_uri}: MLflow's sqlite file needs a local folder; pass --mlflow with the address of "
            "an MLflow server (http://…) or of a local file (sqlite:///…), or set MLFLOW_TRACKING_URI"
        )
    return _checked(f"sqlite:///{storage.resolve(storage_uri)[1]}/mlflow.db")


def absolute_uri(uri: str) -> str:
    """``uri`` as processes with another working folder understand it.

    Raises :class:`UsageError` for what is neither a server nor a sqlite file. (MLflow's plain folders are deprecated;
    other databases belong behind a server, which knows where artifacts go.)
    """
    if uri.startswith(("http://", "https://")):
        if problem := server_problem(uri):
            raise UsageError(f"--mlflow {mask(uri)}: {problem}")
        return uri.rstrip("/")
    if uri.startswith("sqlite:///"):
        return _checked(f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}")
    raise UsageError(f"--mlflow {mask(uri)}: must be an MLflow server (http://… or https://…) or sqlite:///FILE")


def _checked(uri: str) -> str:
    """``uri`` of a sqlite file. MLflow takes ``%``, ``?`` and ``#`` in it for parts of a URL, and tries for minutes."""
    if re.search("[%?#]", uri):
        raise UsageError(
            f"{uri}: MLflow cannot keep a sqlite file in a path with %, ? or #; choose another --storage, or pass "
            "--mlflow with a server (http://…) or another file (sqlite:///FILE)"
        )
    if Path(uri.removeprefix("sqlite:///")).is_dir():
        raise UsageError(f"{uri}: is a folder; name MLflow's file in it, as in sqlite:///FOLDER/mlflow.db")
    return uri


def run_url(run: RunRef, page: str = "") -> str:
    """A page of the run, such as ``artifacts/NAME``; see :func:`study_url`."""
    return study_url(run, f"/{run.run_id}" + (f"/{page}" if page else ""))


def study_url(run: RunRef, below: str = "") -> str:
    """The page that lists the runs of a run's experiment: on its server, for sqlite on that of :func:`open_command`."""
    # MLflow 3 opens on a page about agents; only this address shows runs themselves.
    return f"{_server(run)}/#/experiments/{run.experiment_id}/runs{below}?{_TRAINING}"


def compare_url(runs: Sequence[RunRef]) -> str:
    """The page on which runs of one experiment are compared."""
    ids, experiments = json.dumps([run.run_id for run in runs]), json.dumps([runs[0].experiment_id])
    return f"{_server(runs[0])}/#/compare-runs?runs={quote(ids)}&experiments={quote(experiments)}&{_TRAINING}"


def _server(run: RunRef) -> str:
    return redact(run.uri) if run.uri.startswith("http") else "http://127.0.0.1:5000"


def open_command(uri: str) -> str | None:
    """The shell command that serves a sqlite store's pages on this machine; None where a server does already."""
    if uri.startswith("http"):
        return None
    program = Path(sys.executable).with_name("mlflow")
    with contextlib.suppress(ValueError):
        program = program.relative_to(Path.cwd())
    return f"{shlex.quote(str(program))} ui --workers 1 --backend-store-uri {shlex.quote(absolute_uri(uri))}"


def record_of(run: RunRef, uri: str) -> Path:
    """The local record of what is tracked: in the folder ``uri`` of the run, a temporary one where that is remote."""
    if storage.is_local(uri):
        return Path(storage.resolve(uri)[1]) / "tracking.jsonl"
    return own_folder() / f"{run.run_id}.jsonl"


def keep_of(uri: str) -> str | None:
    """Where a record that MLflow lacks a part of is kept, for a run whose folder ``uri`` is remote."""
    return None if storage.is_local(uri) else storage.join(uri, "tracking")
