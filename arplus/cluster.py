"""The one way in which jobs join Ray: a running cluster where there is one, else one started on this machine."""

import logging
import os
import secrets
import socket
import time
from pathlib import Path

import ray
from ray._private import services
from ray._raylet import Config  # type: ignore[attr-defined]

from arplus.errors import ResourceError, UserError, redacted

log = logging.getLogger(__name__)

ANSWER_S = 5.0
"""Seconds in which a cluster's head must answer."""
_UNSET = "set it to that of a running one, or unset it to run on this machine alone"


def connect(cpus: int | None = None) -> None:
    """Joins the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), else starts one on this machine.

    A cluster of our own has ``cpus`` logical CPUs (the machine's by default) and ends with this process. Its token,
    too, is this process's own. Nothing happens where this process is connected already. Raises :class:`UserError` for
    an address that is none, and :class:`ResourceError` where no cluster answers there.
    """
    quiet()
    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _check(address)
        ray.init(address="auto", logging_level=logging.WARNING)
    else:
        _start(cpus)
    log.info("ray: %s CPUs, %s GPUs", *(f"{ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU")))


def _check(address: str) -> None:
    """Raises our errors where nothing listens at ``RAY_ADDRESS``: Ray itself would ask for minutes, then crash."""
    if "://" in address:
        raise UserError(
            f"RAY_ADDRESS={redacted(address)}: must be HOST:PORT of a cluster's head; from another machine submit the "
            "job with `ray job submit`, and leave RAY_ADDRESS unset to run on this one"
        )
    try:
        found = services.canonicalize_bootstrap_address("auto")  # as Ray reads the variable
    except ConnectionError as error:
        raise ResourceError(f"RAY_ADDRESS={address}: no cluster runs on this machine; {_UNSET}") from error
    except ValueError as error:
        raise UserError(f"RAY_ADDRESS={address}: must be HOST:PORT of a cluster's head; {_UNSET}") from error
    if found is None:  # "local"
        return
    host, port = found.rsplit(":", 1)
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
            return
        except (OSError, OverflowError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ResourceError(f"RAY_ADDRESS={address}: no cluster answers there ({error}); {_UNSET}") from error
        time.sleep(0.5)


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
