"""What an elastic run (``--workers MIN:MAX``) needs beside Ray Train's own scaling."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import ray
from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
    ResourceRequestPriority,
    get_or_create_autoscaling_coordinator,
)

from arplus.training.preflight import FEED_CPUS

_RENEW_S = 30.0
_START_TIMEOUT_S = "20"


@contextmanager
def feed_cpu_kept() -> Iterator[None]:
    """Keeps the data feed's CPU out of what Ray Train's elastic policy counts as room for workers.

    The policy divides all CPUs of the cluster among workers (Ray 2.60), so after the loss of a node those that are left
    would leave none to Ray Data, and wait for it for ever. A request of our own in the same list, earlier than the
    policy's and as urgent, is served first. It expires by itself where this process is killed.

    Ray Train also waits less here for a start that cannot be: of workers on a node that is gone, unknown to it yet.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _START_TIMEOUT_S)
    coordinator, name, over = get_or_create_autoscaling_coordinator(), f"feed-{uuid4().hex[:8]}", threading.Event()

    def request() -> None:
        ray.get(
            coordinator.request_resources.remote(
                requester_id=name,
                resources=[{"CPU": FEED_CPUS}],
                expire_after_s=4 * _RENEW_S,
                priority=ResourceRequestPriority.HIGH,
            ),
            timeout=_RENEW_S,
        )

    def renew() -> None:
        while not over.wait(_RENEW_S):
            try:
                request()
            except ray.exceptions.RayError:  # the next one may get through
                continue

    request()
    threading.Thread(target=renew, name="feed-cpu", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        coordinator.cancel_request.remote(name)
