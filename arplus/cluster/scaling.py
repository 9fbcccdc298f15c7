"""How many workers a run has, and the CPUs and GPUs of each: by its settings, of what the connected cluster has."""

from typing import Any, cast

import ray
from ray.train import ScalingConfig

from arplus.cluster import placement, ray_private
from arplus.config import MIN_WORKER_CPUS, TrainConfig
from arplus.errors import ResourceError, UsageError

FEED_CPUS = 1
"""Whole logical CPUs that workers must leave to Ray Data; without one its tasks wait for ever (ray#64588)."""


def size_workers(config: TrainConfig) -> ScalingConfig:
    """Workers and their resources on the connected cluster: a GPU each as ``--device`` says, CPUs as they are left.

    They are on nodes that qualify, and have a share of a GPU where ``--gpus-per-worker`` says so. Raises
    :class:`ResourceError` with the sum shown when it is too small for the fewest workers that the run may have.
    """
    driver = driver_cpus()
    fewest, wanted = config.world_sizes[0], config.world_sizes[-1]
    cpus, gpus, within = find_room_of_run(config, wanted)
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


def find_room_of_run(config: TrainConfig, workers: int) -> placement.Room:
    """What the connected cluster has for ``workers`` of a run's workers; see :func:`placement.find_room`.

    Raises :class:`UsageError` for workers that would share a GPU with others of their run.
    """
    room = placement.find_room(config.device, config.placement, workers)
    if room.gpus and (problem := config.gpu_sharing_problem()):
        raise UsageError(f"--gpus-per-worker: {problem}")
    return room


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
