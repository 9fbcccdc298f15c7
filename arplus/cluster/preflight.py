"""Checks before any worker starts, so that what cannot run fails at once with one line that says what to change.

The data set's manifest is read, and MLflow is asked for its experiments, by whoever comes next in the driver; here are
the cluster's resources and its nodes. A node that joins later is only asked for its versions, by each of its workers.
"""

import logging
import os
import shutil
from typing import Any, cast
from uuid import uuid4

import ray
from ray.train import ScalingConfig

from arplus import storage
from arplus.cluster import node, nodes, placement, ray_private
from arplus.config import MIN_WORKER_CPUS, TrainConfig
from arplus.data.dataset import Dataset
from arplus.errors import ResourceError, UsageError

log = logging.getLogger(__name__)

FEED_CPUS = 1
"""Whole logical CPUs that workers must leave to Ray Data; without one its tasks wait for ever (ray#64588)."""
MIN_SHM = 128 << 20
"""Bytes of /dev/shm for the windows of the feed, and for what NCCL keeps there; Docker's default is 64 MiB in all."""
MIN_DISK = 1 << 30
"""Bytes of a node's disk for Ray's logs and a copy of the weights."""


def scaling(config: TrainConfig) -> ScalingConfig:
    """Workers and their resources on the connected cluster: a GPU each as ``--device`` says, CPUs as they are left.

    They are on nodes that qualify, and have a share of a GPU where ``--gpus-per-worker`` says so. Raises
    :class:`ResourceError` with the sum shown when it is too small for the fewest workers that the run may have.
    """
    driver = driver_cpus()
    fewest, wanted = config.world_sizes[0], config.world_sizes[-1]
    cpus, gpus, within = placement.find_room(config, wanted)
    chosen = config.placement
    if gpus and fewest > gpus * chosen.runs_per_gpu:
        kind = f" that qualify by {chosen.flags}" if chosen.flags else ""
        raise ResourceError(
            f"--workers {config.workers}: a worker takes one GPU and the cluster has {gpus} alive{kind}; lower "
            "--workers, or take --device gpu, which waits for more, or --device cpu"
        )
    free = min(cpus - FEED_CPUS - driver, within)
    share = config.cpus_per_worker or fair_share(free, cpu_nodes(), wanted, fewest)
    if share < MIN_WORKER_CPUS or fewest * share > free + 1e-6:
        share = max(share, MIN_WORKER_CPUS)
        fit = max(int(free / share + 1e-6), 0)
        total = fewest * share + FEED_CPUS + driver
        raise ResourceError(
            f"--workers {config.workers}: {fewest} workers × {share:g} CPUs + {FEED_CPUS} CPU for the data feed"
            + (f" + {driver:g} CPUs for the job's driver (--entrypoint-num-cpus)" if driver else "")
            + f" = {total:g} CPUs, and the cluster has {cpus:g}"
            + (f", {within:g} of them where workers may be ({chosen.flags}); " if within < cpus else "; ")
            + (f"take at most {fit} workers or fewer --cpus-per-worker" if fit else "it needs more CPUs")
        )
    # Ray keeps resources to four decimals; rounding down leaves the feed its whole CPU. An elastic run's shares are
    # added up and divided again (ray.train.v2 ElasticScalingPolicy), which is exact for sixteenths alone.
    steps = 1e4 if len(config.world_sizes) == 1 else 16
    share = max(int(share * steps), 1) / steps
    return cast(Any, ScalingConfig)(  # mypy sees the class of Ray Train v1
        num_workers=fewest if len(config.world_sizes) == 1 else (fewest, wanted),
        # Just after the loss of a node the policy may count it still, and leave the feed no CPU: it counts again then.
        elastic_resize_monitor_interval_s=30.0,
        use_gpu=gpus > 0,
        resources_per_worker={"CPU": share} | ({"GPU": chosen.gpus_per_worker} if gpus else {}),
        accelerator_type=chosen.accelerator_type,
        label_selector=chosen.labels or None,
    )


def fair_share(free: float, nodes: int, wanted: int, fewest: int) -> float:
    """CPUs of each of ``wanted`` workers, at most one, of those that are ``free`` beside :data:`FEED_CPUS`.

    A feed's task needs a whole CPU of one node. If as many CPUs are left as there are ``nodes``, one of them has it,
    wherever the workers go; of two nodes with two CPUs each, four workers of 3/4 would leave a half to either. What
    the ``fewest`` workers need at least comes first.
    """
    spread = free - FEED_CPUS * max(nodes - 1, 0)
    return min(1.0, max(spread / wanted, min(MIN_WORKER_CPUS, free / fewest)))


def cpu_nodes() -> int:
    """Living nodes of the connected cluster that have CPUs."""
    return sum(node["Alive"] and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes())


def driver_cpus() -> float:
    """CPUs that this job's own driver holds (``ray job submit --entrypoint-num-cpus``)."""
    return float(ray_private.submitted_job().get("entrypoint_num_cpus") or 0.0)


def check_nodes(config: TrainConfig, dataset: Dataset, checkpoint_bytes: int) -> None:
    """Asks every node that is there; :mod:`arplus.cluster.node` says for what. Takes a second or two.

    One object of the data is read and one of the storage is written and deleted, by every node. Raises
    :class:`UsageError` for what a node cannot reach, and :class:`ResourceError` for versions that differ, for GPUs or
    space that are missing, and for a node that does not answer.
    """
    if config.compile == "on" and not placement.find_room(config, 1).gpus:
        raise ResourceError(
            "--compile on: the cluster has no GPU alive, and on CPUs it takes longer; leave it out, or take "
            "--device gpu where an autoscaler starts GPU nodes"
        )
    placement.say_who_qualifies(config.placement)
    _check_storage(config, checkpoint_bytes)
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
    if config.precision == "bf16" and slow and not placement.find_room(config, 1).gpus:
        log.warning("%s (node %s)", node.SLOW_BF16, ", ".join(slow))


def _check_storage(config: TrainConfig, checkpoint_bytes: int) -> None:
    """Local storage must have room for the checkpoints that are kept, the best one and one that is being written."""
    if not storage.is_local(config.storage):
        return
    folder = storage.resolve(config.storage)[1]
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    kept = 1 if config.keep_checkpoints == "all" else config.keep_checkpoints  # at the least
    free, needed = shutil.disk_usage(folder).free, (kept + 2) * checkpoint_bytes
    if free < needed:
        raise ResourceError(
            f"--storage {config.storage}: {_size(free)} free, and {kept} + 2 checkpoints of "
            f"{_size(checkpoint_bytes)} take {_size(needed)}; free some space or lower --keep-checkpoints"
        )


def _size(n: int) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"
