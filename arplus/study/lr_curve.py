"""What each worker of a learning-rate range test does.

Apart from :mod:`arplus.study.lr_find`, for the reason that :mod:`arplus.training.rank` has.
"""

import itertools
import logging
import math
from typing import Any

import torch.distributed as dist

from arplus import storage
from arplus.config import LrFindConfig
from arplus.errors import NonFiniteLossError, UsageError
from arplus.training import workers
from arplus.training.context import RunEndedError
from arplus.training.engine import Engine
from arplus.training.loop import seed_dropout
from arplus.training.rank import loaders, on_all_ranks
from arplus.training.start import load

log = logging.getLogger(__name__)


def run(config: LrFindConfig) -> list[dict[str, float]] | UsageError:
    """The curve of a fresh model, or why there can be none."""
    settings = config.run
    device = workers.set_up(settings)
    try:
        dataset, model, _ = on_all_ranks(lambda: storage.with_retries(settings.data, load, settings, None))
    except RunEndedError as ended:
        error: UsageError = ended.args[0]
        return error
    loader, _ = loaders(settings, dataset, device)
    return curve(Engine(model, settings, device, config.steps), loader.batches, loader.steps, config)


def curve(engine: Engine, batches: Any, steps: int, config: LrFindConfig) -> list[dict[str, float]]:
    """The curve: rate and losses per step, to the last step, to a loss that is not finite, or to one that is too high.

    ``batches(epoch, first, last)`` gives this worker's part of ``steps`` steps per epoch; all workers see the same
    losses and so end at the same step.
    """
    factor = (config.lr_to / config.lr_from) ** (1 / (config.steps - 1))
    points: list[dict[str, float]] = []
    mean, lowest = 0.0, math.inf
    for epoch in itertools.count():
        for step in batches(epoch, 0, min(steps, config.steps - len(points))):
            rate = config.lr_from * factor ** len(points)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            seed_dropout(config.run.seed, len(points))
            engine.train_step(step)
            try:
                (result,), _ = engine.read()
            except NonFiniteLossError:
                return points
            points.append(
                {"lr": rate, "loss": result.loss, "dialogue_loss": result.dialogue, "grad_norm": result.grad_norm}
            )
            if dist.get_rank() == 0 and len(points) % max(config.steps // 10, 1) == 0:
                log.info("step %d/%d | lr %.2e | L_D %.4f", len(points), config.steps, rate, result.dialogue)
            mean = 0.9 * mean + 0.1 * result.dialogue
            smoothed = mean / (1 - 0.9 ** len(points))
            lowest = min(lowest, smoothed)
            if smoothed > config.give_up * lowest or len(points) == config.steps:
                return points
    raise AssertionError("itertools.count ends")
