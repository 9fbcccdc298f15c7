"""Asking the nodes of the connected cluster, and what their workers said last where they do not answer."""

import contextlib
import logging
import re
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arplus.cluster import ray_private
from arplus.errors import ResourceError

log = logging.getLogger(__name__)

ANSWER_S = 30.0
"""Seconds in which a worker has mostly started and answered."""
LONGEST_S = 240.0
"""Seconds that a node has where its workers do not say what is wrong: on a busy machine one takes a minute to start."""
_LOG_S = 5
_LOOK_S = 10.0
_TAIL = 100
_RAYLETS_OWN = re.compile(r"\[\d{4}-\d\d-\d\d .*\] |\[(state-dump|file)|\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\s+[A-Z]+ ")
_GONE = (ray.exceptions.RayActorError, ray.exceptions.TaskUnschedulableError)


def name_of(node: dict[str, Any]) -> str:
    """How messages call one of ``ray.nodes()``."""
    return f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"


def ask(question: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """What ``question(*arguments, node's short id)`` gives on every living node, by the node's name.

    Raises :class:`ResourceError` for a node that does not answer, though it lives on; with its workers' last line.
    """
    look: Any = ray.remote(num_cpus=0, max_retries=0)(question)
    asked = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            asked[look.options(scheduling_strategy=there).remote(*arguments, node["NodeID"][:8])] = node
    ready, late, waited = _answers(asked)
    facts, problems = {}, dict.fromkeys(late, f"no answer within {waited:.0f} s")
    for ref in ready:
        try:
            facts[name_of(asked[ref])] = ray.get(ref)
        except _GONE:
            problems[ref] = "no answer"  # the node has died, or is about to be noticed
        except ray.exceptions.RayError as error:
            problems[ref] = _in_a_line(error)
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
    for ref, problem in problems.items():
        node = asked[ref]
        if node["NodeID"] in alive:
            raise ResourceError(f"node {name_of(node)}: {problem}{_reason(node['NodeID'])}")
    return facts


def _answers(asked: dict[ray.ObjectRef[Any], dict[str, Any]]) -> tuple[list[Any], list[Any], float]:
    """Who has answered, who has not, and in how many seconds.

    Who is late may be slow. It is waited for until a worker has said that it cannot start, or the node is gone.
    """
    waited = ANSWER_S
    ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=ANSWER_S)
    while late and waited < LONGEST_S and not any(last_words(asked[ref]["NodeID"]) for ref in late):
        if waited == ANSWER_S:
            names = ", ".join(name_of(asked[ref]) for ref in late)
            log.warning("no answer from %s within %.0f s: its workers start slowly, so the job waits", names, ANSWER_S)
        waited += _LOOK_S
        ready, late = ray.wait(list(asked), num_returns=len(asked), timeout=_LOOK_S)
    return ready, late, waited


def check_workers() -> None:
    """Raises :class:`ResourceError` where no worker of this job can start, which Ray would try for ever.

    Nothing happens where one is merely slow, as with packages that Ray installs first.
    """
    ref = ray.remote(num_cpus=0, max_retries=0)(_answer).remote()
    try:
        if ray.wait([ref], timeout=ANSWER_S)[0]:
            ray.get(ref)
            return
    except ray.exceptions.RayError as error:
        raise ResourceError(f"this job's workers cannot work: {_in_a_line(error)}{_ADVICE}") from None
    for node in ray.nodes():
        if node["Alive"] and last_words(node["NodeID"]):
            raise ResourceError(f"node {name_of(node)}: no worker within {ANSWER_S:.0f} s{_reason(node['NodeID'])}")


def _answer() -> None:
    """Nothing, by a worker that has this project."""


_ADVICE = "; workers need the Python and the packages of the job: start all nodes from one image"


def _reason(node_id: str) -> str:
    if said := last_words(node_id):
        return f"; the last line of a worker that ended there: {said}{_ADVICE}"
    return "; see `ray status`, or take the node away"


def last_words(node_id: str) -> str:
    """The last line of a node's workers that ended before they could say it to anyone; empty where there is none.

    Such a worker writes to the log of its node's raylet, among the raylet's own lines.
    """
    lines: list[str] = []
    with contextlib.suppress(Exception):  # without an explanation the job must not fail in another way
        lines = _log_of(node_id, "raylet.err")
    said = [line.strip() for line in lines if line.strip() and not _RAYLETS_OWN.match(line)]
    return said[-1] if said else ""


def _log_of(node_id: str, name: str) -> list[str]:
    """The last lines of a file among a node's logs."""
    from ray.util.state import get_log

    context, mine = ray.get_runtime_context(), ray_private.logs_folder()
    if node_id == context.get_node_id() and mine is not None:
        # The agent that would read it is missing where several clusters share a machine, and with it a port.
        return (mine / name).read_text(errors="replace").splitlines()[-_TAIL:]
    wanted: dict[str, Any] = {"filename": name, "tail": _TAIL, "timeout": _LOG_S, "errors": "replace"}
    # Without an address it looks for a cluster, and finds others of this machine too.
    return "".join(get_log(context.gcs_address, node_id, **wanted)).splitlines()


def _in_a_line(error: Exception) -> str:
    """The last line of an error of Ray, whose others are the worker's traceback."""
    return [line.strip() for line in str(error).splitlines() if line.strip()][-1]
