"""What an elastic run (``--workers MIN:MAX``) needs beside Ray Train's own scaling."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import ray

from arplus.cluster import ray_private
from arplus.cluster.scaling import FEED_CPUS

_LOOK_S = 2.0
_RENEW_S = 30.0
_START_TIMEOUT_S = "20"
_SAVING_S = 25.0
"""A node that is to be taken away counts for so long still: the workers look every ten seconds, and save first."""


@contextmanager
def reserve_room() -> Iterator[None]:
    """Keeps out of what Ray Train's elastic policy counts as room for workers what they must not take (Ray 2.60).

    The policy divides all CPUs of the cluster among workers: also the data feed's, for which Ray Data would then wait
    for ever, and those of a node that drains, on which nothing more is placed. A request of our own in the same list,
    earlier than the policy's and as urgent, is served first. It expires by itself where this process is killed, and an
    autoscaler that sees it replaces the node.

    Ray Train also waits less here for a start that cannot be: of workers on a node that is gone, unknown to it yet.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S)
    coordinator, priority = ray_private.autoscaling_coordinator()
    name, over = f"kept-{uuid4().hex[:8]}", threading.Event()

    def request(bundles: list[dict[str, float]]) -> None:
        ray.get(
            coordinator.request_resources.remote(
                requester_id=name, resources=bundles, expire_after_s=4 * _RENEW_S, priority=priority
            ),
            timeout=_RENEW_S,
        )

    def renew() -> None:
        seen: dict[str, float] = {}
        asked, asked_at = feed, time.monotonic()
        while not over.wait(_LOOK_S):
            try:
                bundles = _draining(seen) + feed  # the larger first
                if bundles != asked or time.monotonic() - asked_at >= _RENEW_S:
                    request(bundles)
                    asked, asked_at = bundles, time.monotonic()
            except ray.exceptions.RayError:  # the next one may get through
                continue

    feed = [{"CPU": float(FEED_CPUS)}]
    request(feed)
    threading.Thread(target=renew, name="room-kept", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        coordinator.cancel_request.remote(name)


def _draining(seen: dict[str, float]) -> list[dict[str, float]]:
    """CPUs and GPUs of each living node that has drained for a while; ``seen`` says since when, and is kept up."""
    draining, now = ray_private.draining_nodes(), time.monotonic()
    for gone in seen.keys() - draining.keys():
        del seen[gone]
    for node in draining:
        seen.setdefault(node, now)
    old = {node for node, since in seen.items() if now - since >= _SAVING_S}
    nodes: list[dict[str, Any]] = ray.nodes() if old else []
    found = ({k: node["Resources"].get(k, 0.0) for k in ("CPU", "GPU")} for node in nodes if node["NodeID"] in old)
    return [{k: amount for k, amount in resources.items() if amount} for resources in found]
