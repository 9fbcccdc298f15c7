"""What this project takes of Ray that is not public: a function each, as read in Ray 2.60.

Ray's private modules are imported when a function is called, so what an upgrade moves breaks its callers alone.
``tests/test_upgrades.py`` says which. After an upgrade, read again what each function relies on, then set READ_IN.
"""

import functools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from arplus.process import SUBMITTED

READ_IN = "2.60.0"
"""The version in which all of this was read."""


def bootstrap_address() -> str | None:
    """HOST:PORT of the cluster that ``RAY_ADDRESS`` names, as ``ray.init`` reads it; None for a cluster of one's own.

    ``ray.init`` itself asks an address where nothing listens for minutes, then crashes. Raises ConnectionError where no
    cluster runs on this machine, and ValueError for an address that cannot be read.
    """
    from ray._private import services

    found: str | None = services.canonicalize_bootstrap_address("auto")
    return found


def node_addresses(head: str, timeout: float) -> list[str]:
    """Addresses of a cluster's nodes, before this process has joined it: ``ray.nodes()`` answers only afterwards."""
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    return [node.node_manager_address for node in GcsClient(address=head).get_all_node_info(timeout=timeout).values()]


def read_variables_again() -> None:
    """Has Ray read its variables, such as ``RAY_AUTH_MODE``, which it else does at its import (ray#57835)."""
    from ray._raylet import Config  # type: ignore[attr-defined]

    Config.initialize("")


def start_workers_without_uv() -> None:
    """Under ``uv run`` Ray starts each worker by it too, in a copy of the folder with an environment of its own.

    The default since ray#53060. Its variable is read at Ray's import.
    """
    from ray._private import ray_constants

    ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False


def runs_the_head() -> bool:
    """Whether the connected cluster was started by this process; no public call tells."""
    node = ray._private.worker.global_worker.node
    return node is not None and node.is_head()


def logs_folder() -> Path | None:
    """Where this process's own node keeps its logs, in the folder of its session; None where it has no node."""
    node: Any = ray._private.worker._global_node
    return None if node is None else Path(node.get_logs_dir_path())


def submitted_job() -> dict[str, Any]:
    """What Ray keeps of the job that ``ray job submit`` made of this process, with its id; empty for any other process.

    The public client would ask the dashboard, which may be missing or behind a proxy.
    """
    from ray.dashboard.modules.job.common import JOB_ID_METADATA_KEY, JobInfoStorageClient
    from ray.experimental.internal_kv import _internal_kv_get

    settings = json.loads(os.environ.get(SUBMITTED) or "{}")
    job = (settings.get("metadata") or {}).get(JOB_ID_METADATA_KEY)
    if job is None:
        return {}
    found = _internal_kv_get(JobInfoStorageClient.JOB_DATA_KEY.format(job_id=job), namespace="job")
    return {**json.loads(found), "submission_id": job} if found else {}


def draining_nodes() -> dict[str, int]:
    """Ids of the nodes that are about to be taken away, and when; ``ray.nodes()`` does not say."""
    found: dict[str, int] = ray._private.state.state.get_draining_nodes()
    return found


def autoscaling_coordinator() -> tuple[Any, Any]:
    """The actor that divides the cluster among Ray Train and Ray Data (ray#64824), and Ray Train's priority there."""
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        ResourceRequestPriority,
        get_or_create_autoscaling_coordinator,
    )

    return get_or_create_autoscaling_coordinator(), ResourceRequestPriority.HIGH


def mute_reports() -> None:
    """Mutes loggers that are named by Ray's files.

    One repeats every report, one regrets that bars are off, one finds it slow that a sweep keeps its record on storage,
    one does not find the files that Ray Tune was told not to write.
    """
    reports = Path(ray.__file__).parent / "train/v2/_internal/execution/context.py"
    logging.getLogger(str(reports)).setLevel(logging.WARNING)
    for name in ("ray.data._internal.progress", "ray.tune.utils.util", "ray.tune.analysis.experiment_analysis"):
        logging.getLogger(name).setLevel(logging.ERROR)


def choose_worker_lines(wanted: Callable[[str, Any], bool]) -> None:
    """Prints only the ``wanted`` of the lines that workers print, given with their process; Ray shows all or none."""
    from ray._private import ray_logging

    dispatcher, name = ray_logging.global_worker_stdstream_dispatcher, "ray_print_logs"
    if show := dict(dispatcher.handlers).get(name):

        def show_wanted(data: dict[str, Any]) -> None:
            process = data.get("ip"), data.get("pid")
            if lines := [line for line in data["lines"] if wanted(line, process)]:
                show(data | {"lines": lines})

        dispatcher.remove_handler(name)
        dispatcher.add_handler(name, show_wanted)


@contextmanager
def deaf_to_the_terminal() -> Iterator[None]:
    """Ray's processes that are started meanwhile get no Ctrl-C: it is the job's, which then needs them to save.

    Ray means them to be so, but its dashboard's processes die of it. What watches a run then asks in vain, and says
    "Failed to query Ray Train Controller actor state".
    """
    from ray._private import services

    module: Any = services
    popen = module.ConsolePopen
    module.ConsolePopen = functools.partial(popen, process_group=0)
    try:
        yield
    finally:
        module.ConsolePopen = popen


def keep_keys_out_of_trials() -> None:
    """Ray Tune puts AWS's keys into the runtime_env of every trial, which Ray logs and shows (ray#28276).

    A trial has its node's.
    """
    from ray.tune.execution import class_cache

    keys = {name for name in class_cache.ENV_VARS_TO_PROPAGATE if name.startswith("AWS_")}
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(keys)


def progress_bar(name: str) -> Any:
    """A bar that this process draws and any worker that is given it moves; "experimental" in Ray, which has no other.

    All that are given it move the same one, also a worker that takes the place of a dead one.
    """
    from ray.experimental import tqdm_ray

    return tqdm_ray.tqdm(desc=name, unit="step")
