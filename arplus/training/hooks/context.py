"""What every worker of a run is given, and how a run ends early."""

from dataclasses import dataclass
from pathlib import Path

from arplus import tracking
from arplus.config import TrainConfig
from arplus.runs.attempt import Attempt


@dataclass(frozen=True, kw_only=True)
class StudyContext:
    """Context of a run that belongs to a study. Such a run logs warnings only and does not send its model to MLflow."""

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
