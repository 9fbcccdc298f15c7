"""A run's folder, as an object that knows by name what is in it.

It holds::

    config.json            the resolved configuration
    attempt.json           who may write here (:mod:`arplus.runs.attempt`)
    checkpoints/NAME/      see :mod:`arplus.runs.checkpoint`
    best.json              the checkpoint with the lowest response perplexity
    final_metrics.json     what a finished run came to
    audit/                 which examples every step trained on (:mod:`arplus.runs.audit`)
    profile/               what ``--profile-steps`` asked for
    tracking.jsonl         what was tracked, for a folder on this machine; else parts that MLflow lacks, in tracking/
    ray/                   Ray's own files, of no later use
"""

from dataclasses import asdict, dataclass
from typing import Any

from arplus import storage
from arplus.config import TrainConfig, from_dict
from arplus.documents import Document
from arplus.runs import attempt, checkpoint, retention
from arplus.storage import patient


@dataclass(frozen=True, kw_only=True)
class FinalMetrics:
    """What a finished run leaves in ``final_metrics.json``."""

    run_name: str
    preset: str
    fingerprint: str
    """Of the data."""
    steps: int
    examples: int
    """Examples trained on, over all epochs."""
    stopped_early: bool
    """Whether --patience ended it."""
    best_response_ppl: float | None
    """None where nothing was validated."""
    train_seconds: float
    peak_memory_bytes: int
    """Of rank 0."""
    mlflow_run_id: str
    valid: dict[str, int | float]
    """Metrics of the last validation."""

    def flat(self) -> dict[str, Any]:
        """The metrics by the names that they have in the file and in MLflow: those of the validation as ``valid/…``."""
        values = asdict(self)
        return values | {f"valid/{name}": value for name, value in values.pop("valid").items()}


class _FinalDocument(Document[FinalMetrics]):
    """The metrics, flat."""

    def _from_values(self, values: dict[str, Any]) -> FinalMetrics:
        valid = {name: values.pop(name) for name in list(values) if name.startswith("valid/")}
        values["valid"] = {name.removeprefix("valid/"): value for name, value in valid.items()}
        return from_dict(FinalMetrics, values, source=self.uri)

    def _to_values(self, value: FinalMetrics) -> dict[str, Any]:
        return value.flat()


class RunFolder:
    """What is in a run's folder, by name. All of it waits for storage that is away, so a caller need not."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.config = Document(storage.join(uri, "config.json"), TrainConfig)
        self.final = _FinalDocument(storage.join(uri, "final_metrics.json"), FinalMetrics)
        self.checkpoints = CheckpointFolder(uri)
        self.read_attempt = patient(attempt.read, uri)
        self.take_over = patient(attempt.take_over, uri)
        self.start_attempt = patient(attempt.start, uri)
        self.request_stop = patient(attempt.request_stop, uri)
        self.delete_audit = patient(storage.delete, storage.join(uri, "audit"))

    def holds(self, uri: str) -> bool:
        """Whether what is at ``uri``, such as a checkpoint, is this run's own."""
        return storage.within(uri, self.uri)


class CheckpointFolder:
    """What reads and mends a run's checkpoints, of :mod:`arplus.runs.checkpoint`; the saver of training writes them."""

    def __init__(self, run_uri: str) -> None:
        self.list_complete = patient(checkpoint.list_complete, run_uri)
        self.newest = patient(checkpoint.newest, run_uri)
        self.restore_best = patient(checkpoint.restore_best, run_uri)
        self.keep_best_weights = patient(retention.keep_best_weights, run_uri)
        self.delete_all = patient(retention.delete_all, run_uri)
