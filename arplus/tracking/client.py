"""Everything that touches mlflow: connecting, starting a run, sending what was logged.

MLflow is imported on first use: it takes seconds, and most of what imports this package never needs it.
"""

import contextlib
import fcntl
import getpass
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from arplus.errors import ArplusError, RefusedError, ResourceError, UsageError, redact
from arplus.process import in_thread
from arplus.tracking.refusal import Event, advice, brief, is_final, status_of
from arplus.tracking.run import RunRef, absolute_uri

logger = logging.getLogger(__name__)

METRICS_A_REQUEST = 1000
"""MLflow's limit."""
TAG_LENGTH = 5000
"""Longest value of a tag that servers of the last years take."""
_PARAM_LENGTH = 6000
_REACH_S = 15.0
"""Seconds a server has to answer before a job starts."""
_SQLITE_S = 180.0
"""Seconds for a sqlite store: on first use MLflow makes its tables, slowly on a busy machine."""
_DIGEST_LENGTH = 36
_MOST_CHILDREN = 50_000
"""MLflow's limit of runs in one answer, far more than a study can have running."""
_KIND, _TRAINING, _INFERRED = "mlflow.experimentKind", "custom_model_development", "_inferred"
"""The experiment's tag that opens its pages for model training; by default they are those of agents."""


class _RefusingError(ResourceError, RefusedError):
    """The server answers, and refuses."""


# ------------------------------------------------------------------------------------------------------- connecting


def make_client(uri: str) -> Any:
    """An ``MlflowClient`` for ``uri``, quiet and impatient. A server is not contacted; a sqlite file is made."""
    client_class = _load()
    if not uri.startswith("sqlite:"):
        return client_class(uri)
    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{database}.lock", "w") as lock:  # of two processes that make the tables at once, one would fail
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            said = f"{database}: sqlite needs locks, and this file system has none ({error.strerror})"
            raise UsageError(f"{said}; name a server or another disk's sqlite:///PATH with --mlflow") from None
        return client_class(uri)


def connect(uri: str) -> Any:
    """A client whose server has answered. Raises :class:`ResourceError` where it does not within about 15 seconds."""

    def ask() -> Any:
        client = make_client(uri)
        client.search_experiments(max_results=1)
        return client

    _load()
    with explain(uri):
        # A name that does not resolve outlasts any limit on requests.
        return in_thread(ask, _SQLITE_S if uri.startswith("sqlite:") else _REACH_S)


def check_reachable(uri: str) -> None:
    """Raises :class:`ResourceError` when the server does not answer within about 15 seconds, or refuses us."""
    connect(absolute_uri(uri))


@contextlib.contextmanager
def explain(uri: str) -> Iterator[None]:
    """Turns what MLflow raises into a :class:`ResourceError` that names the address and the flag.

    Where it is a :class:`RefusedError` too, waiting is of little use.
    """
    try:
        yield
    except ArplusError:
        raise
    except Exception as error:
        final = is_final(error)
        what_to_do = advice(error) if final else "start it"
        if status_of(error) == 404:
            what_to_do = "check the address, and what was deleted there"
        raise (_RefusingError if final else ResourceError)(
            f"MLflow at {redact(uri)} cannot be used ({brief(error)}); {what_to_do}, or choose another with --mlflow"
        ) from None


def _load() -> Any:
    # MLflow has no settings a client, only the environment's. Its own are two minutes a request and seven retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "30")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    from mlflow.tracking.client import MlflowClient

    for chatty in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    return MlflowClient


# --------------------------------------------------------------------------------------------------------- starting


def start_run(
    uri: str,
    experiment: str,
    run_name: str,
    *,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
    parent_run_id: str | None = None,
    resume_run_id: str | None = None,
) -> RunRef:
    """Makes a run, or takes up ``resume_run_id`` again: it is then RUNNING, with new tags and its first params.

    Safe to call from several processes at once. A run to resume that the server no longer has is replaced by a new
    one, with a warning. Raises :class:`ResourceError` for a server that does not answer and :class:`UsageError` for an
    experiment that was deleted.
    """
    uri = absolute_uri(uri)
    client = connect(uri)
    with explain(uri):
        again = None if resume_run_id is None else _experiment_of(client, resume_run_id, ": a new run is started")
        if resume_run_id is not None and again is not None:
            client.update_run(resume_run_id, status="RUNNING")
            run = RunRef(uri, again, resume_run_id)
        else:
            experiment_id = find_or_make_experiment(client, uri, experiment)
            family = {"mlflow.user": _user()}
            if parent_run_id is not None:
                family["mlflow.parentRunId"] = parent_run_id
            created = client.create_run(experiment_id, tags=family, run_name=run_name)
            run = RunRef(uri, experiment_id, created.info.run_id)
        _describe(client, run.run_id, tags, params)
    return run


def find_run(uri: str, run_id: str) -> RunRef | None:
    """A run, as it is; None, with a warning, where the server no longer has it.

    Raises :class:`ResourceError` for a server that does not answer.
    """
    uri = absolute_uri(uri)
    with explain(uri):
        experiment_id = _experiment_of(connect(uri), run_id)
    return None if experiment_id is None else RunRef(uri, experiment_id, run_id)


def _experiment_of(client: Any, run_id: str, otherwise: str = "") -> str | None:
    from mlflow.exceptions import MlflowException

    try:
        found = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        found = None
    if found is None or found.info.lifecycle_stage != "active":
        logger.warning("MLflow run %s was deleted or is on another server%s", run_id, otherwise)
        return None
    return str(found.info.experiment_id)


def find_or_make_experiment(client: Any, uri: str, name: str) -> str:
    """The id of an experiment. Raises :class:`UsageError` for one that was deleted."""
    from mlflow.exceptions import MlflowException

    # With sqlite there is no server to choose a place for artifacts; MLflow would take the working folder.
    artifacts = str(Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts") if uri.startswith("sqlite") else None
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, artifact_location=artifacts, tags={_KIND: _TRAINING}))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)  # another process was faster
    if found.lifecycle_stage != "active":
        raise UsageError(f"--experiment {name}: was deleted in MLflow; restore it there or choose another name")
    if found.tags.get(_KIND, _INFERRED).endswith(_INFERRED):  # nobody chose another
        client.set_experiment_tag(found.experiment_id, _KIND, _TRAINING)
    return str(found.experiment_id)


def _user() -> str:
    try:
        return getpass.getuser()
    except (ImportError, KeyError, OSError):  # a container's user without a name
        return str(os.getuid())


def _describe(client: Any, run_id: str, tags: Mapping[str, str], params: Mapping[str, Any]) -> None:
    """Logs tags, and those params that the run lacks: MLflow's params can be set once only."""
    from mlflow.entities import Param, RunTag

    known = client.get_run(run_id).data
    for key in known.tags:
        if key.startswith("failure."):  # of the attempt before, which this one goes on from
            client.delete_tag(run_id, key)
    client.log_batch(
        run_id,
        params=[Param(k, str(v)[:_PARAM_LENGTH]) for k, v in params.items() if k not in known.params],
        tags=[RunTag(k, str(v)[:TAG_LENGTH]) for k, v in tags.items()],
    )


# ---------------------------------------------------------------------------------------------------------- studies


def end_run(run: RunRef, status: str, tags: Mapping[str, str]) -> None:
    """Sets the status and tags of a run that another process has logged to; what is refused is left, with a warning.

    One that has ended keeps its end. Raises :class:`ResourceError` for a server that does not answer.
    """
    from mlflow.entities import RunTag

    client = connect(run.uri)
    ended = [RunTag(k, str(v)[:TAG_LENGTH]) for k, v in tags.items()]
    with explain(run.uri), _unless_refused(f"MLflow run {run.run_id}: cannot be set to {status}"):
        client.set_terminated(run.run_id, status, client.get_run(run.run_id).info.end_time)
        client.log_batch(run.run_id, tags=ended)


def annotate(runs: Mapping[RunRef, tuple[Mapping[str, str], Mapping[str, float]]]) -> None:
    """Sets tags and metrics of runs that have ended, all on one server; what is refused is left, with a warning.

    Raises :class:`ResourceError` for a server that does not answer.
    """
    from mlflow.entities import Metric, RunTag

    now = time.time_ns() // 1_000_000
    uri = next(iter(runs)).uri
    with explain(uri):
        client = connect(uri)
        for run, (tags, metrics) in runs.items():
            with _unless_refused(f"MLflow run {run.run_id}: cannot be described"):
                client.log_batch(
                    run.run_id,
                    metrics=[Metric(key, value, now, 0) for key, value in metrics.items()],
                    tags=[RunTag(key, value[:TAG_LENGTH]) for key, value in tags.items()],
                )


def end_children(parent: RunRef) -> None:
    """Ends the runs of a study that are still RUNNING; one that is refused stops no other.

    A process that was killed between making a run and noting its id leaves one that nobody knows.
    """
    with explain(parent.uri):
        client = connect(parent.uri)
        family = f"tags.`mlflow.parentRunId` = '{parent.run_id}' and attributes.status = 'RUNNING'"
        for run in client.search_runs([parent.experiment_id], family, max_results=_MOST_CHILDREN):
            with _unless_refused(f"MLflow run {run.info.run_id}: cannot be set to KILLED"):
                client.set_terminated(run.info.run_id, "KILLED")


@contextlib.contextmanager
def _unless_refused(what: str) -> Iterator[None]:
    """Passes over what the server refuses, with a warning."""
    try:
        yield
    except Exception as error:
        if not is_final(error):
            raise
        logger.warning("%s: %s", what, brief(error))


# ---------------------------------------------------------------------------------------------------------- sending


def send(client: Any, events: list[Event]) -> None:
    """Sends metrics, or one event of another kind. Sending again what was sent changes nothing."""
    from mlflow.entities import Dataset, DatasetInput, InputTag, Metric

    event = events[0]
    run_id = event["run_id"]
    if "key" in event:
        client.log_batch(run_id, metrics=[Metric(e["key"], e["value"], e["timestamp"], e["step"]) for e in events])
    elif "tag" in event:
        client.set_tag(run_id, event["tag"], event["value"])
    elif "text" in event:
        client.log_text(run_id, event["text"], event["artifact"])
    elif "file" in event:
        client.log_artifact(run_id, event["file"], event["artifact"])
    elif "dataset" in event:
        name, fingerprint, source, context = (event["dataset"][k] for k in ("name", "fingerprint", "source", "context"))
        kind = "s3" if source.startswith("s3://") else "local"
        dataset = Dataset(name, digest(fingerprint), kind, json.dumps({"uri": source}))
        client.log_inputs(run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])
    elif "status" in event:
        client.set_terminated(run_id, event["status"], event["timestamp"])


def without_repeats(client: Any, events: list[Event], known: dict[str, set[int]]) -> list[Event]:
    """The metrics of ``events`` at steps that the server had no point of when their name was first met.

    A run that goes on from a checkpoint trains some steps again and computes the same numbers. MLflow keeps every
    point and deletes none, so a second one would only make the curve jump back. ``known`` (name → steps) is filled.
    """
    for event in events:
        if event["key"] not in known:
            known[event["key"]] = {m.step for m in client.get_metric_history(event["run_id"], event["key"])}
    return [event for event in events if event["step"] not in known[event["key"]]]


def digest(fingerprint: str) -> str:
    """A data set's fingerprint, cut to what MLflow takes."""
    return fingerprint[:_DIGEST_LENGTH]


# ----------------------------------------------------------------------------------------------------------- system


class SystemMonitor:
    """MLflow's system metrics of this machine, under its names, for whoever sends them on; it asks no server.

    MLflow's own variables say how often: ``MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL`` and ``…_SAMPLES_BEFORE_LOGGING``.
    """

    def __init__(self) -> None:
        _load()
        from mlflow import environment_variables
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        self.seconds = environment_variables.MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10.0
        """Seconds between two samples."""
        self.samples = environment_variables.MLFLOW_SYSTEM_METRICS_SAMPLES_BEFORE_LOGGING.get() or 6
        """Samples of which means are taken."""
        self._monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(Exception):  # where there is no GPU of NVIDIA's, or no driver
            self._monitors.append(GPUMonitor())
        self.sample()  # psutil's first use of a CPU is 0, whatever it was
        self._clear()

    def sample(self) -> None:
        """Takes a sample."""
        for monitor in self._monitors:
            monitor.collect_metrics()

    def means(self) -> dict[str, float]:
        """The means of the samples since the last time; empty where there was none."""
        found = {f"system/{name}": v for monitor in self._monitors for name, v in monitor.aggregate_metrics().items()}
        self._clear()
        return found

    def _clear(self) -> None:
        for monitor in self._monitors:
            monitor.clear_metrics()
