"""What each worker of a run does: from what the job gives it (:mod:`arplus.training.context`) to the final metrics.

Apart from :mod:`arplus.training.trainer`, so that workers alone import DeepSpeed, which takes seconds.
"""

import functools
import logging
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from arplus import storage
from arplus.cluster import node
from arplus.config import TrainConfig
from arplus.data.capacity import Filler
from arplus.data.collate import BatchSpec
from arplus.data.dataset import Dataset
from arplus.data.loader import RankLoader
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker, serve
from arplus.errors import ArplusError, NonFiniteLossError
from arplus.runs.attempt import Attempt
from arplus.runs.checkpoint import TrainProgress
from arplus.runs.folder import FinalMetrics, RunFolder
from arplus.training import failure, workers
from arplus.training.context import RunContext, RunEndedError
from arplus.training.engine import Engine, is_compiled
from arplus.training.hooks import close_hooks, final_metrics, make_hooks
from arplus.training.loop import fit
from arplus.training.start import load

log = logging.getLogger(__name__)

T = TypeVar("T")


def run(job: RunContext) -> FinalMetrics | Exception:
    """The final metrics, or why the run ends here, where starting the workers again would not help."""
    try:
        return _train(job)
    except NonFiniteLossError as error:
        # Every worker is here. Returned, not raised: a retry would come to the same step and the same loss.
        return error
    except RunEndedError as ended:
        reason: Exception = ended.args[0]
        return reason


def _train(job: RunContext) -> FinalMetrics:
    config, folder = job.config, RunFolder(job.run_uri)
    device = workers.set_up(config, job.part.side_by_side if job.part else 1)
    on_all_ranks(lambda: node.check_versions(socket.gethostname(), node.versions(), job.versions))
    places = [""] * dist.get_world_size()
    dist.all_gather_object(places, failure.here())
    mine, start = on_all_ranks(lambda: _begin(job, folder, places), only_rank_0=True)
    dataset, model, state = on_all_ranks(lambda: storage.with_retries(folder.uri, load, config, start))
    progress = TrainProgress(fingerprint=dataset.fingerprint) if state is None else state.progress
    if start is not None and folder.holds(start):
        restore = functools.partial(folder.checkpoints.restore_best, start, progress)
        progress.set_best(on_all_ranks(restore, only_rank_0=True))
    else:
        progress.best_response_ppl, progress.validations_since_best = None, 0  # this run's, not another's
    train_loader, valid_loader = loaders(config, dataset, device)
    steps = config.total_steps(train_loader.sampler.split.examples)
    engine = Engine(model, config, device, steps)
    if state is not None:
        engine.load_moments(state.moments, progress.step)
        engine.schedule.load(state.schedule)
    hooks = make_hooks(job, mine, engine, dataset, steps, start)
    try:
        fit(engine, train_loader, valid_loader, progress, config, hooks)
        return final_metrics(job, progress, steps, hooks)
    finally:
        close_hooks(hooks)


def _begin(job: RunContext, folder: RunFolder, places: list[str]) -> tuple[Attempt, str | None]:
    """The attempt of this start, and the checkpoint to go on from: the job's newest, else the one it started from."""
    mine = folder.start_attempt(job.attempt, places)
    found = folder.checkpoints.newest(after=job.attempt.number)
    start, step = (found[0], found[1].progress.step) if found else (job.start, None)
    if mine.number > job.attempt.number + 1:
        where = "from where the job started" if step is None else f"from step {step}"
        said = f" after {failure.sentence(mine.failure)}" if mine.restarted_by_failure else ""
        log.warning(
            "the workers were started again (attempt %d)%s, %d of them: going on %s",
            mine.number,
            said,
            dist.get_world_size(),
            where,
        )
    return mine, start


def loaders(config: TrainConfig, dataset: Dataset, device: torch.device) -> tuple[RankLoader, RankLoader]:
    """The training and the validation batches of one worker; a collective call."""
    spec = BatchSpec.of(config.model, dataset.sizes)

    def loader(split: str, shuffled: bool) -> RankLoader:
        sampler = EpochSampler(
            split=dataset.split(split, config.feed.max_examples if split == "train" else None),
            batch_size=config.batch_size,
            window_batches=config.feed.batches_of_window(config.batch_size),
            seed=config.seed,
            shuffled=shuffled,
        )
        maker = WindowMaker(
            sampler=sampler,
            spec=spec,
            workers=dist.get_world_size(),
            accumulation=config.gradient_accumulation_steps,
            prefetch=config.feed.prefetch,
        )
        server = on_all_ranks(lambda: serve(maker), only_rank_0=True) if maker.workers > 1 else None
        largest = config.micro_batch_size(maker.workers)
        filler = Filler(dataset.rules, largest) if is_compiled(config, device) else None
        return RankLoader(maker, dist.get_rank(), server, filler)

    return loader("train", True), loader("valid", False)


def on_all_ranks(work: Callable[[], T], *, only_rank_0: bool = False) -> T:
    """What ``work`` gives on this worker, or on rank 0; :class:`RunEndedError` on all where one has our errors."""
    mine: tuple[Any, Exception | None] = (None, None)
    if dist.get_rank() == 0 or not only_rank_0:
        try:
            mine = (work(), None)
        except ArplusError as problem:
            mine = (None, problem)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine if only_rank_0 else (None, mine[1]))
    for _, error in found:
        if error is not None:
            raise RunEndedError(error)
    return found[0][0] if only_rank_0 else mine[0]
