"""The training loop: one worker's way through the epochs. Everything else is called from here and lives elsewhere."""

import math
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import timedelta
from functools import reduce
from operator import or_
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from arplus.config import TrainConfig
from arplus.data.loader import RankLoader, Step
from arplus.errors import NonFiniteLossError
from arplus.runs.checkpoint import TrainProgress
from arplus.training.engine import Engine
from arplus.training.group import RollCall
from arplus.training.hooks.base import Hook, Request
from arplus.training.meter import Meter, peak_of

POLL_EVERY_BATCHES = 16
"""Batches of a validation between two questions what rank 0 asks for."""


class Trained(NamedTuple):
    """A step that was made and not yet read."""

    step: int
    epoch: int
    example_ids: list[torch.Tensor]
    """This worker's."""


def fit(
    engine: Engine,
    train: RankLoader,
    valid: RankLoader,
    progress: TrainProgress,
    config: TrainConfig,
    hooks: Sequence[Hook],
) -> None:
    """Trains from ``progress`` to the end of the run, or until rank 0 asks to end, and keeps ``progress`` up to date.

    Where the validation split has no example, nothing is validated and no checkpoint is the best one. Raises
    :class:`NonFiniteLossError` naming the step, its example ids and the last good checkpoint, and
    :class:`HangError` naming the workers that the others have waited for too long.
    """
    with RollCall(timedelta(minutes=config.collective_timeout_minutes)) as roll:
        _Loop(engine, train, valid, progress, config, hooks, roll).run()


@dataclass
class _Loop:
    """What one call of :func:`fit` works with."""

    engine: Engine
    train: RankLoader
    valid: RankLoader
    progress: TrainProgress
    config: TrainConfig
    hooks: Sequence[Hook]
    roll: RollCall
    unread: list[Trained] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.total = self.config.total_steps(self.train.sampler.split.examples)
        self.validates = self.valid.sampler.split.examples > 0
        self.meter = Meter(
            total_steps=self.total,
            config=self.config,
            sizes=self.train.maker.spec.sizes,
            device=self.engine.device,
            peak_flops=peak_of(self.engine.device, self.config.precision),
        )
        self.engine.before_reduction = self._before_reduction

    def run(self) -> None:
        """Trains, validates and saves until the end."""
        progress = self.progress
        if progress.unvalidated:
            if not self._validate_unless_ended():
                return
            self._save()
        while not self._is_over():
            last = min(self.train.steps, progress.epoch_step + self.total - progress.step)
            self.roll.at(f"waits for the data of step {progress.step + 1}")
            for step in self.meter.measure(self.train.batches(progress.epoch, progress.epoch_step, last)):
                self._make(step)
                if self._finish_step():
                    return
                self.roll.at(f"waits for the data of step {progress.step + 1}")

    def _is_over(self) -> bool:
        return self.progress.step >= self.total or any(hook.is_over(self.progress) for hook in self.hooks)

    def _make(self, step: Step) -> None:
        progress = self.progress
        self.roll.at(f"computes step {progress.step + 1}")
        for hook in self.hooks:
            hook.before_step(progress)
        seed_dropout(self.config.seed, progress.step)
        self.engine.train_step(step)
        self.unread.append(Trained(progress.step, progress.epoch, [b.example_id_B for b in step.micro_batches]))
        for hook in self.hooks:
            hook.after_step(progress, step)
        progress.step += 1
        progress.epoch_step += 1
        progress.examples = _examples_seen(progress, self.train)

    def _finish_step(self) -> bool:
        """Reads, logs, validates and saves what is due after a step; whether the run ends with it."""
        progress, config = self.progress, self.config
        at_end = progress.step >= self.total or progress.epoch_step == self.train.steps
        due = _due(config.validate_every, progress.step) or _due(config.checkpoint_every, progress.step)
        logs = progress.step % config.log_every == 0 or at_end
        if not (logs or due or self.engine.wants_reading):
            return False
        requested = self._read(logs)
        if progress.epoch_step == self.train.steps:
            progress.epoch += 1
            progress.epoch_step = 0
        if self.validates and (at_end or _due(config.validate_every, progress.step)):
            progress.unvalidated = True
            if Request.END in requested or not self._validate_unless_ended():
                requested |= Request.END
            self.meter.skip_pause()
        if at_end or due or requested & (Request.SAVE | Request.END):
            self._save()
        return Request.END in requested or self._is_over()

    def _before_reduction(self) -> None:
        self.meter.own.stop()
        self.roll.at(f"adds up the gradients of step {self.progress.step + 1}")

    def _read(self, logs: bool) -> Request:
        """Reads the steps since the last time, and logs their means; what rank 0 asks for, and what follows from it."""
        self.roll.at(f"reads the losses of step {self.progress.step}")
        try:
            results, asked = self.engine.read(self._request())
        except NonFiniteLossError as error:
            raise self._explain(error) from None
        self.unread.clear()
        self.progress.train_seconds += self.meter.add(results)
        if logs:
            metrics = self.meter.take(self.progress)
            for hook in self.hooks:
                hook.on_log(self.progress, metrics)
        return self._answer(asked)

    def _request(self) -> Request:
        """What this worker's hooks ask for. The numbers of all workers are added up, and only rank 0 has one."""
        if dist.get_rank():
            return Request.NOTHING
        return reduce(or_, (hook.request() for hook in self.hooks), Request.NOTHING)

    def _answer(self, asked: int) -> Request:
        requested = Request(asked)
        return reduce(or_, (hook.on_request(requested) for hook in self.hooks), requested)

    def _validate_unless_ended(self) -> bool:
        """Makes the validation that is due; False where rank 0 asks to end meanwhile, which leaves it due.

        Whoever stops a job waits seconds and a node that is taken away leaves minutes, which a validation may take
        itself: what rank 0 asks for is done in it, and a checkpoint that is saved in it holds that it is still due.
        """
        assert self.progress.unvalidated
        metrics = validate(self.engine, self.valid, self.config, self._asks_to_end)
        if metrics is None:
            return False
        self.progress.add_validation(metrics)
        for hook in self.hooks:
            hook.on_validation(self.progress, metrics)
        return True

    def _asks_to_end(self) -> bool:
        """Whether rank 0 asks to end; all workers ask at the same batch, so that they leave, or save, at the same."""
        self.roll.at(f"validates at step {self.progress.step}")
        asked = torch.tensor(int(self._request()), device=self.engine.device)
        dist.all_reduce(asked)
        requested = self._answer(int(asked))
        if Request.END not in requested and Request.SAVE in requested:
            self._save()
        return Request.END in requested

    def _save(self) -> None:
        self.roll.at(f"saves at step {self.progress.step}")
        began = time.monotonic()
        for hook in self.hooks:
            hook.on_checkpoint(self.progress)
        for hook in self.hooks:
            hook.after_checkpoint(self.progress, time.monotonic() - began)
        self.meter.skip_pause()

    def _explain(self, error: NonFiniteLossError) -> NonFiniteLossError:
        trained = self.unread[error.index]
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, [i for ids in trained.example_ids for i in ids.tolist()])
        ids = sorted(i for part in gathered for i in part)
        checkpoint = next((hook.last_checkpoint for hook in self.hooks if hook.last_checkpoint), "none yet")
        return NonFiniteLossError(
            f"step {trained.step + 1} of epoch {trained.epoch + 1}: {error}; the step was not applied. "
            f"Example ids: {ids}. Last good checkpoint: {checkpoint}. "
            f"A lower --optimizer.lr is the usual cure"
        )


def validate(
    engine: Engine, loader: RankLoader, config: TrainConfig, ended: Callable[[], bool]
) -> dict[str, float] | None:
    """Losses over exactly all examples of a split, summed over the workers: means are per target, not per batch.

    None once ``ended``, which is asked every :data:`POLL_EVERY_BATCHES` batches on all workers.
    """
    own = torch.zeros(len(config.model.loss_counts(1, 1)), dtype=torch.float64, device=engine.device)
    targets = examples = 0  # targets of all workers, and this one's examples
    with closing(loader.batches(epoch=0)) as steps:
        for number, step in enumerate(steps):
            if number % POLL_EVERY_BATCHES == 0 and ended():
                return None
            targets += step.targets
            for batch in step.micro_batches:
                own += engine.evaluate(batch).together()
                examples += len(batch.example_id_B)
    sums = torch.cat([own, own.new_tensor([examples])])
    dist.all_reduce(sums)
    dialogue, auxiliary, *weight_and_a, examples = sums.tolist()
    assert examples == loader.sampler.split.examples, "validation must see every example exactly once"
    found = {
        "dialogue_loss": dialogue / targets,
        "auxiliary_loss": auxiliary / targets,
        "loss": config.objective.total(dialogue, auxiliary) / targets,
        "response_ppl": math.exp(min(dialogue / targets, 700.0)),
        **({} if config.objective.lambda0 else {"auxiliary_ppl": math.exp(min(auxiliary / targets, 700.0))}),
        "examples": examples,
    }
    for name, value in zip(("weight_loss", "mean_a"), weight_and_a, strict=False):
        found[name] = value / examples
    found["loss"] += config.objective.lambda2 * found.get("weight_loss", 0.0)
    return found


def seed_dropout(seed: int, step: int) -> None:
    """Seeds torch for one step of one worker, so that a resumed run draws the dropout that it would have drawn."""
    state = np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


def _examples_seen(progress: TrainProgress, loader: RankLoader) -> int:
    in_epoch = min(progress.epoch_step * loader.sampler.batch_size, loader.sampler.split.examples)
    return progress.epoch * loader.sampler.split.examples + in_epoch


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
