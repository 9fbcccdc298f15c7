"""How many runs of a study fit on the cluster side by side."""

import math
from collections.abc import Iterable
from typing import Literal, NamedTuple

from arplus.cluster.placement import Room
from arplus.cluster.scaling import FEED_CPUS, cpu_nodes, driver_cpus, fair_share, find_room_of_run
from arplus.config import MIN_WORKER_CPUS, StudyConfig, TrainConfig, VocabularySizes
from arplus.errors import ResourceError
from arplus.training.footprint import run_bytes, weight_bytes


class Slots(NamedTuple):
    """What a study's runs share."""

    side_by_side: int
    cpus_per_worker: float
    """CPUs per worker of each of them."""
    device: Literal["gpu", "cpu"]
    """Where all of them train: one that starts while a GPU node is away waits for it, as another kind would differ."""


def find_slots(config: StudyConfig, runs: int) -> Slots:
    """Slots for at most ``runs`` runs on the connected cluster; see :func:`fit`."""
    room = find_room_of_run(config.run, config.run.world_sizes[-1] * (config.concurrency or 1))
    return fit(config, runs, *room, driver=driver_cpus(), nodes=cpu_nodes())


def fit(
    config: StudyConfig,
    runs: int,
    cpus: float,
    gpus: int,
    within: float = math.inf,
    *,
    driver: float = 0.0,
    nodes: int = 1,
) -> Slots:
    """As many runs as there are GPUs, or shares of them, for; without GPUs, as many as have whole CPUs, or one.

    One whole CPU of one of the ``nodes`` is left to all runs' data feeds together: their tasks wait for each other and
    end. Workers have the CPUs ``within`` the nodes that qualify. ``driver`` is what the job's own
    driver holds. Raises :class:`ResourceError` with the sum shown where not even one run fits, or not the
    ``--concurrency`` asked for.
    """
    workers, free = config.run.world_sizes[-1], min(cpus - FEED_CPUS - driver, within)

    def share(n: int) -> float:
        return config.run.cpus_per_worker or fair_share(free, nodes, n * workers, n * workers)

    def fits(n: int, least: float = MIN_WORKER_CPUS) -> bool:
        enough = share(n) >= least and n * workers * share(n) <= free + 1e-6
        return enough and (not gpus or n * workers <= gpus * config.run.placement.runs_per_gpu)

    wanted = config.concurrency or 1
    if not fits(wanted):
        least = max(share(wanted), MIN_WORKER_CPUS)
        raise ResourceError(_refusal(config, wanted, least, Room(cpus, gpus, within), driver))
    if config.concurrency is None:
        least = MIN_WORKER_CPUS if gpus or config.run.cpus_per_worker else 1.0
        while wanted < runs and fits(wanted + 1, least):
            wanted += 1
    # Ray keeps resources to four decimals.
    return Slots(wanted, int(share(wanted) * 1e4) / 1e4, "gpu" if gpus else "cpu")


def stored_bytes(runs: Iterable[tuple[TrainConfig, int]], slots: Slots, sizes: VocabularySizes) -> int:
    """Bytes of a study's checkpoints at most, of so many runs of each of these settings.

    Of one that has ended the weights alone stay, unless --keep-checkpoints is all.
    """
    rooms, total = [], 0
    for run, count in runs:
        whole = run_bytes(run, sizes)
        ended = whole if run.keep_checkpoints == "all" else weight_bytes(run, sizes)
        total += count * ended
        rooms += [whole - ended] * count
    return total + sum(sorted(rooms)[-slots.side_by_side - 1 :])  # those that train, and the best


def _refusal(config: StudyConfig, runs: int, share: float, room: Room, driver: float) -> str:
    cpus, gpus, within = room
    workers = config.run.world_sizes[-1]
    flags = f"--workers {config.run.workers}" + (f" --concurrency {runs}" if config.concurrency else "")
    chosen = config.run.placement
    if gpus and runs * workers > gpus * chosen.runs_per_gpu:
        each, kind = chosen.gpus_per_worker, f" that qualify by {chosen.flags}" if chosen.flags else ""
        return (
            f"{flags}: {runs} run(s) side by side × {workers} workers × {each:g} GPU = {runs * workers * each:g} GPUs, "
            f"and the cluster has {gpus} alive{kind}; lower --workers or --concurrency, or take --device gpu, which "
            "waits for more, or --device cpu"
        )
    total = runs * workers * share + FEED_CPUS + driver
    there = f", {within:g} of them where workers may be ({chosen.flags})" if within < cpus else ""
    driven = f" + {driver:g} CPUs for the job's driver (--entrypoint-num-cpus)" if driver else ""
    return (
        f"{flags}: {runs} run(s) side by side × {workers} workers × {share:g} CPUs + {FEED_CPUS} CPU for the data feed"
        f"{driven} = {total:g} CPUs, and the cluster has {cpus:g}{there}; lower --workers, --concurrency or "
        "--cpus-per-worker"
    )
