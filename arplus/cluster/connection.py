"""The one way in which jobs join Ray, and what of it they may take.

They join a running cluster where there is one; else they start one on this machine.
"""

import contextlib
import functools
import logging
import math
import os
import secrets
import socket
import time
from typing import NamedTuple

import ray

from arplus import proxies
from arplus.cluster import noise, ray_private
from arplus.config import Device
from arplus.errors import ResourceError, UsageError, mask
from arplus.process import environment

log = logging.getLogger(__name__)

ANSWER_S = 5.0
"""Seconds in which a cluster's head must answer."""
_UNSET = "set it to that of a running one, or unset it to run on this machine alone"


def connect(cpus: int | None = None) -> None:
    """Joins the cluster that ``RAY_ADDRESS`` names (``ray job submit`` sets it), else starts one on this machine.

    A cluster of our own has ``cpus`` logical CPUs (the machine's by default) and ends with this process. Its token,
    too, is this process's own. Nothing happens where this process is connected already. Raises :class:`UsageError` for
    an address that is none, and :class:`ResourceError` where no cluster answers there or Ray does not start here.
    """
    quiet()
    if ray.is_initialized():
        return
    address = os.environ.get("RAY_ADDRESS")
    if address and (head := _checked(address)):
        _bypass_proxies(head)
        # The user's variables of the same name, of `ray job submit`, are part of what is set here.
        os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")
        # Of several clusters on a machine Ray's own helpers in the workers would find any.
        variables = proxies.for_workers() | {"RAY_ADDRESS": head}
        ray.init(address="auto", logging_level=logging.WARNING, runtime_env={"env_vars": variables})
    else:
        _start(cpus)
    noise.leave_out()
    log.info("ray: %s CPUs, %s GPUs", *(f"{ray.cluster_resources().get(name, 0):g}" for name in ("CPU", "GPU")))


def leave() -> None:
    """Leaves the cluster: what its workers say later comes to nobody, and a job's last words are the last ones."""
    ray.shutdown()


def _checked(address: str) -> str | None:
    """The HOST:PORT that ``RAY_ADDRESS`` stands for; None for a cluster of one's own.

    Raises our errors where nothing listens there.
    """
    if "://" in address:
        raise UsageError(
            f"RAY_ADDRESS={mask(address)}: must be HOST:PORT of a cluster's head; from another machine submit the "
            "job with `ray job submit`, and leave RAY_ADDRESS unset to run on this one"
        )
    try:
        found = ray_private.bootstrap_address()
    except ConnectionError as error:
        raise ResourceError(f"RAY_ADDRESS={mask(address)}: no cluster runs on this machine; {_UNSET}") from error
    except ValueError as error:
        raise UsageError(f"RAY_ADDRESS={mask(address)}: must be HOST:PORT of a cluster's head; {_UNSET}") from error
    if found is None:  # "local"
        return None
    host, port = found.rsplit(":", 1)
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_S).close()
            return found
        except (OSError, OverflowError, ValueError) as error:
            if time.monotonic() > deadline:
                raise ResourceError(
                    f"RAY_ADDRESS={mask(address)}: no cluster answers there ({error}); {_UNSET}"
                ) from error
        time.sleep(0.5)


def _bypass_proxies(head: str) -> None:
    """Ray's processes ask each other by HTTP, and no proxy knows them: this process passes by it for all nodes."""
    hosts = [os.environ["RAY_ADDRESS"].rpartition(":")[0], head.rpartition(":")[0]]
    with contextlib.suppress(ray.exceptions.RayError):  # Ray itself will say what is wrong
        hosts += ray_private.node_addresses(head, ANSWER_S)
    proxies.bypass(host.strip("[]") for host in hosts)


def _check_sockets() -> None:
    """Raises :class:`UsageError` where Ray's sockets cannot be: the folder's name is too long, or it is read-only."""
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    folder = os.environ.get(name, "/tmp")
    limit = 107 - len("/ray/session_2000-01-01_00-00-00_000000_4194304/sockets/plasma_store")
    if len(os.fsencode(folder)) > limit:
        raise UsageError(
            f"{name}={folder}: has {len(os.fsencode(folder))} bytes, and Ray's sockets need {limit} at most; set "
            "RAY_TMPDIR to a shorter path"
        )
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{name}={folder}: {error.strerror}; set RAY_TMPDIR to a folder that can be made") from error


def _start(cpus: int | None) -> None:
    _check_sockets()
    proxies.bypass()
    # Ray Train watches its controller through the dashboard of the cluster that it finds. Without an address it may
    # find the cluster of another job on this machine, miss its controller there and take the workers' resources away.
    # In a runtime_env the address would do as well, but then Ray uses none of the workers that it starts with the
    # cluster, and starts each of its own by another Python: 0.9 s.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # Ray on Linux listens on all interfaces, and runs what anyone sends there who has the token.
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_GCS_SERVER_PORT": str(port)}
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    ray_private.read_variables_again()
    ray_private.start_workers_without_uv()
    try:
        with ray_private.deaf_to_the_terminal(), environment({"RAY_ADDRESS": f"127.0.0.1:{port}"}):
            ray.init(
                address="local",
                num_cpus=cpus,
                include_dashboard=True,
                dashboard_host="127.0.0.1",
                logging_level=logging.WARNING,
            )
    except Exception as error:  # Ray 2.60 raises nothing narrower where a part of it does not come up in 30 s
        said = mask(str(error).strip().partition("\n")[0].rstrip(" .:"))  # the last lines of a log follow
        raise ResourceError(f"Ray does not start ({said}); if this machine is busy, start the job later") from error


class Offer(NamedTuple):
    """What a job may take of the connected cluster."""

    cpus: float
    """CPUs; infinite where nodes that are yet to start bring their own."""
    gpus: int
    """GPUs; 0 where it computes on CPUs."""


def offer(device: Device, gpus: int, alive: int | None = None) -> Offer:
    """What the cluster has for a job with ``--device``, which takes ``gpus`` GPUs at most, or at least with "gpu".

    Where the job does not take any GPU, ``alive`` says how many of those that it takes live.
    Only "gpu" counts on nodes that do not live yet: no part of Ray 2.60 says what an autoscaler could start
    (``get_max_resources_from_cluster_config`` is None, since neither of its autoscalers reports its configuration).
    Raises :class:`ResourceError` for "gpu" where no GPU can ever come.
    """
    there = ray.cluster_resources()
    found = Offer(there.get("CPU", 0.0), int(there.get("GPU", 0)) if alive is None else alive)
    if device == "cpu":
        return found._replace(gpus=0)
    if device == "gpu" and found.gpus < gpus:
        if may_grow():
            _say(f"--device gpu: {found.gpus} of {gpus} GPUs are alive; waiting until the cluster has started the rest")
            return Offer(math.inf, gpus)
        if not found.gpus:
            raise ResourceError("--device gpu: this machine has no GPU; leave it out, or submit the job to a cluster")
    if not found.gpus and may_grow():
        _say("no GPU of the cluster is alive, so this runs on CPUs; --device gpu asks its autoscaler for GPUs")
    return found


def may_grow() -> bool:
    """Whether nodes may join: to all clusters but the one that ends with this process."""
    return not ray_private.runs_the_head()


@functools.cache
def _say(line: str) -> None:
    """Logs a line once, however often it is true."""
    log.info(line)


def quiet() -> None:
    """Leaves warnings of Ray's libraries and drops their running commentary, in the process that calls it."""
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)
    ray_private.mute_reports()
