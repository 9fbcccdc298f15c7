"""Where workers may be: on all nodes of the connected cluster, or on those that qualify by a run's placement.

Ray finds a kind of GPU by a resource of its nodes, ``accelerator_type:L4``, and labels by a selector. Its own words on
workers that fit nowhere are "no available node", again and again, so that is found out here.
"""

import logging
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import ray

from arplus.cluster import connection, nodes
from arplus.config import Device, PlacementConfig
from arplus.errors import ResourceError

log = logging.getLogger(__name__)

_ACCELERATOR = "accelerator_type:"


class Room(NamedTuple):
    """What workers may take."""

    cpus: float
    """CPUs of the cluster; infinite where nodes that are yet to start bring their own."""
    gpus: int
    """GPUs of the nodes that qualify; 0 where workers compute on CPUs."""
    within: float = math.inf
    """CPUs of the nodes that qualify; infinite where all do."""


def find_room(device: Device, placement: PlacementConfig, workers: int) -> Room:
    """What the cluster has for ``workers`` workers, by ``--device`` as in :func:`connection.offer`.

    Raises :class:`ResourceError` where no node qualifies and none can come.
    """
    cards = -(-workers // placement.runs_per_gpu)
    if not placement.flags:
        return Room(*connection.offer(device, cards))
    found = [node for node in _living() if qualifies(node, placement)]
    gpus = int(sum(node["Resources"].get("GPU", 0) for node in found))
    wanted = bool(placement.accelerator_type) or device == "gpu"
    if not (gpus if wanted else found) and not (device == "gpu" and connection.may_grow()):
        raise ResourceError(f"{placement.flags}: {_nobody(device)}")
    offer = connection.offer(device, cards, alive=gpus)
    cpus = sum(node["Resources"].get("CPU", 0.0) for node in found)
    return Room(*offer, within=math.inf if math.isinf(offer.cpus) else cpus)


def qualifies(node: Mapping[str, Any], placement: PlacementConfig) -> bool:
    """Whether workers may be on one of ``ray.nodes()``."""
    kind = placement.accelerator_type
    labels = node["Labels"]
    return (kind is None or _ACCELERATOR + kind in node["Resources"]) and all(
        _matches(labels.get(key), wanted) for key, wanted in placement.labels.items()
    )


def _matches(label: str | None, wanted: str) -> bool:
    """Whether a label is as asked, as Ray's raylets read it: a node without the label is "not A"."""
    values = re.split(", ?", wanted.removeprefix("!").removeprefix("in(").removesuffix(")"))
    return (label in values) != wanted.startswith("!")


def say_who_qualifies(placement: PlacementConfig) -> None:
    """Logs which nodes workers may be on, if not all."""
    if placement.flags:
        found = [node for node in _living() if qualifies(node, placement)]
        names = ", ".join(map(nodes.name_of, found)) or "none yet"
        log.info("%s: %d of %d nodes qualify: %s", placement.flags, len(found), len(_living()), names)


def _living() -> list[dict[str, Any]]:
    return [node for node in ray.nodes() if node["Alive"]]


def _nobody(device: Device) -> str:
    """That no node qualifies, and what nodes there are."""

    def described(node: dict[str, Any]) -> str:
        kinds = [name.removeprefix(_ACCELERATOR) for name in node["Resources"] if name.startswith(_ACCELERATOR)]
        labels = [f"{key}={value}" for key, value in sorted(node["Labels"].items()) if key != "ray.io/node-id"]
        return f"{nodes.name_of(node)}: {', '.join([*kinds, *labels]) or 'no kind of GPU, no label'}"

    wait = "; --device gpu waits for one" if device == "auto" and connection.may_grow() else ""
    return f"no living node qualifies{wait}; there are {'; '.join(map(described, _living()))}"
