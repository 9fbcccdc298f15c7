"""What every worker of a run is given, and how a run ends early."""

from dataclasses import dataclass
from typing import Any

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
    progress_bar: Any
    """The driver's, for rank 0 to move; None where nobody would see it."""
    versions: dict[str, str]
    """Those of the job's own node, which every worker's must equal (:func:`arplus.cluster.node.versions`)."""
    part: StudyContext | None = None
    """Of which study the run is a part, if it is of one."""


class RunEndedError(Exception):
    """The run ends here, and starting the workers again would not help; ``args[0]`` is the reason, an error of ours."""
