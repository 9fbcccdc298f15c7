"""The one way in which jobs join Ray: a running cluster where there is one, else one started on this machine."""

import logging
import os
import secrets
import socket
from pathlib import Path

import ray
from ray._raylet import Config  # type: ignore[attr-defined]

log = logging.getLogger(__name__)


def connect(cpus: int | None = None) -> None:
    """Joins the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), else starts one on this machine.

    A cluster of our own has ``cpus`` logical CPUs (the machine's by default) and ends with this process. Its token,
    too, is this process's own. Nothing happens where this process is connected already.
    """
    quiet()
    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(address="auto", logging_level=logging.WARNING)
    else:
        _start(cpus)
    log.info("ray: %s CPUs, %s GPUs", *(f"{ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU")))


def _start(cpus: int | None) -> None:
    # Ray Train watches its controller through the dashboard of the cluster that it finds. Without an address it may
    # find the cluster of another job on this machine, miss its controller there and take the workers' resources away.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray on Linux listens on all interfaces, and runs what anyone sends there who has the token.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_GCS_SERVER_PORT": str(port)}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    Config.initialize("")  # reads the variables again, as Ray itself does after such a change
    ray.init(
        address="local",
        num_cpus=cpus,
        include_dashboard=True,
        dashboard_host="127.0.0.1",
        logging_level=logging.WARNING,
        runtime_env={"env_vars": {"RAY_ADDRESS": f"127.0.0.1:{port}"}},
    )


def quiet() -> None:
    """Leaves warnings of Ray's libraries and drops their running commentary, in the process that calls it."""
    for name in ("ray.data", "ray.train"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # Ray 2.60 names this logger by its file; it repeats every report, which our log line has said already.
    reports = Path(ray.__file__).parent / "train/v2/_internal/execution/context.py"
    logging.getLogger(str(reports)).setLevel(logging.WARNING)
    # It warns that progress bars are off, which is our choice: ours is the training step's.
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
