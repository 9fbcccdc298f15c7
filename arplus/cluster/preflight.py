"""Checks before any worker starts, so that what cannot run fails at once with one line that says what to change.

The data set's manifest is read, and MLflow is asked for its experiments, by whoever comes next in the driver; here are
the cluster's nodes. A node that joins later is only asked for its versions, by each of its workers.
"""

import logging
import os
import shutil
from uuid import uuid4

from arplus import storage
from arplus.cluster import node, nodes, placement
from arplus.cluster.scaling import find_room_of_run
from arplus.config import TrainConfig
from arplus.data.dataset import Dataset
from arplus.errors import ResourceError, UsageError

log = logging.getLogger(__name__)

MIN_SHM = 128 << 20
"""Bytes of /dev/shm for the windows of the feed, and for what NCCL keeps there; Docker's default is 64 MiB in all."""
MIN_DISK = 1 << 30
"""Bytes of a node's disk for Ray's logs and a copy of the weights."""


def check_nodes(config: TrainConfig, dataset: Dataset, stored_bytes: int) -> None:
    """Asks every node that is there; :mod:`arplus.cluster.node` says for what. Takes a second or two.

    One object of the data is read and one of the storage is written and deleted, by every node. Raises
    :class:`UsageError` for what a node cannot reach, and :class:`ResourceError` for versions that differ, for GPUs or
    space that are missing, and for a node that does not answer.
    """
    if config.compile == "on" and not find_room_of_run(config, 1).gpus:
        raise ResourceError(
            "--compile on: the cluster has no GPU alive, and on CPUs it takes longer; leave it out, or take "
            "--device gpu where an autoscaler starts GPU nodes"
        )
    placement.say_who_qualifies(config.placement)
    _check_storage(config, stored_bytes)
    marker = storage.join(config.storage, f".preflight-{uuid4().hex[:8]}")
    storage.write_bytes(marker, b"")
    try:
        facts = nodes.ask(node.probe, dataset.split("train").row_groups[0].file, config.storage, marker)
    finally:
        storage.delete(marker)
    mine = node.versions()
    for name, said in facts.items():
        if said.problems:
            raise UsageError(f"node {name}: {'; '.join(said.problems)}")
        node.check_versions(name, said.versions, mine)
        if said.free_shm < MIN_SHM:
            raise ResourceError(
                f"node {name}: {_size(said.free_shm)} free in /dev/shm, and training needs {_size(MIN_SHM)}; start "
                "Docker with --shm-size, in Kubernetes mount an emptyDir of medium Memory there"
            )
        if said.free_disk < MIN_DISK:
            raise ResourceError(
                f"node {name}: {_size(said.free_disk)} free for temporary files, and Ray needs {_size(MIN_DISK)}"
            )
    warn_of_slow_bf16(config, facts)


def warn_of_slow_bf16(config: TrainConfig, facts: dict[str, node.NodeReport]) -> None:
    """Warns, once for all workers, where they are to compute in bf16 on processors that have no instructions for it."""
    slow = [name for name, said in facts.items() if not said.bf16]
    if config.precision == "bf16" and slow and not find_room_of_run(config, 1).gpus:
        log.warning("%s (node %s)", node.SLOW_BF16, ", ".join(slow))


def _check_storage(config: TrainConfig, stored_bytes: int) -> None:
    """Local storage must have room for all checkpoints that are there at one time."""
    if not storage.is_local(config.storage):
        return
    folder = storage.resolve(config.storage)[1]
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if (free := shutil.disk_usage(folder).free) < stored_bytes:
        raise ResourceError(
            f"--storage {config.storage}: {_size(free)} free, and the checkpoints that are there at one time take "
            f"{_size(stored_bytes)}; free some space or lower --keep-checkpoints"
        )


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
