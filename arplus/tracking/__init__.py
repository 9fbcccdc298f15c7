"""MLflow, through its client alone: one run, fed in the background, that a dead server cannot hold up.

The driver makes (or takes up) the run once with :func:`start_run` and hands the plain :class:`RunRef` to rank 0, which
logs through a :class:`Tracker`. Whatever is logged goes to a JSONL record on the local disk first and to the server
from a background thread; what a server missed can be filled in afterwards::

    python -m arplus.tracking replay RECORD --mlflow URI

Modules: ``run`` (what a run is, and where it lives) · ``client`` and ``registry`` (models), which alone import mlflow ·
``tracker`` (logging) · ``replay``.
"""

from arplus.tracking.client import (
    SystemMonitor,
    annotate,
    check_reachable,
    end_children,
    end_run,
    find_run,
    start_run,
)
from arplus.tracking.registry import (
    Flavor,
    artifact_of,
    as_begun,
    fetched,
    flavor_files,
    is_model_uri,
    pin,
    register_model,
    registered,
    server_of,
)
from arplus.tracking.replay import replay
from arplus.tracking.run import (
    NOTE,
    RunRef,
    compare_url,
    default_uri,
    keep_of,
    open_command,
    run_url,
    study_url,
)
from arplus.tracking.tracker import Status, Tracker
