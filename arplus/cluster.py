"""The one way in which jobs join Ray: a running cluster where there is one, else one started on this machine."""

import logging
import os

import ray

log = logging.getLogger(__name__)


def connect() -> None:
    """Joins the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), else starts one on this machine.

    A cluster of our own is private to this job, so it needs no token (Ray 2.60 asks for one by default); one that
    others run keeps its own choice. Nothing happens where this process is connected already.
    """
    quiet()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.WARNING)
    else:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        # Ray Train asks the dashboard for the state of its actors, and warns every second where there is none.
        ray.init(address="local", include_dashboard=True, dashboard_host="127.0.0.1", logging_level=logging.WARNING)
    log.info("ray: %s CPUs, %s GPUs", *(f"{ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU")))


def quiet() -> None:
    """Leaves warnings of Ray's libraries and drops their running commentary, in the process that calls it."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It warns that progress bars are off, which is our choice: ours is the training step's.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
