"""Checks before any worker starts, so that what cannot run fails at once with one line that says what to change."""

import ray
from ray.train import ScalingConfig

from arplus.config import TrainConfig
from arplus.errors import ResourceError

FEED_CPUS = 1
"""Whole logical CPUs that workers must leave to Ray Data; without one its tasks wait for ever (ray#64588)."""
MIN_WORKER_CPUS = 0.2
"""The smallest share of a CPU that a worker is given by default."""


def scaling(config: TrainConfig) -> ScalingConfig:
    """Workers and their resources on the connected cluster: a GPU each where there are any, CPUs as they are left.

    Raises :class:`ResourceError` with the sum shown when the cluster is too small.
    """
    cluster = ray.cluster_resources()
    cpus, gpus = cluster.get("CPU", 0.0), int(cluster.get("GPU", 0))
    if gpus and config.workers > gpus:
        raise ResourceError(f"--workers {config.workers}: a worker takes one GPU and the cluster has {gpus}")
    share = config.worker_cpus or min(1.0, (cpus - FEED_CPUS) / config.workers)
    if share < MIN_WORKER_CPUS or config.workers * share + FEED_CPUS > cpus + 1e-6:
        share = max(share, MIN_WORKER_CPUS)
        most = max(int((cpus - FEED_CPUS) / share + 1e-6), 0)
        total = config.workers * share + FEED_CPUS
        raise ResourceError(
            f"--workers {config.workers}: {config.workers} workers × {share:g} CPUs + {FEED_CPUS} CPU for the data "
            f"feed = {total:g} CPUs, and the cluster has {cpus:g}; "
            + (f"take at most {most} workers or fewer --worker-cpus" if most else "it needs more CPUs")
        )
    # Ray keeps resources to four decimals; rounding down leaves the feed its whole CPU.
    share = int(share * 1e4) / 1e4
    return ScalingConfig(
        num_workers=config.workers,
        use_gpu=gpus > 0,
        resources_per_worker={"CPU": share} | ({"GPU": 1} if gpus else {}),
    )
