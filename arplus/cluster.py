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
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.WARNING)
    else:
        os.environ["RAY_AUTH_MODE"] = "disabled"
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING)
    log.info("ray: %s CPUs, %s GPUs", *(f"{ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU")))
