"""The training loop: one worker's way through the epochs. Everything else is called from here and lives elsewhere."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from arplus.config import TrainConfig
from arplus.data.loader import RankLoader, Step
from arplus.process import peak_memory_bytes
from arplus.runs.checkpoint import TrainProgress
from arplus.training.engine import Engine, NonFiniteLossError, StepResult

log = logging.getLogger(__name__)

T = TypeVar("T")

POLL_EVERY_BATCHES = 16
"""Batches of a validation between two questions what rank 0 asks for."""


class Control(IntFlag):
    """What rank 0 asks all workers for at the end of a step. Only one worker may look at a clock or at storage."""

    NOTHING = 0
    LOOK = 1
    """See whether a node is to be taken away."""
    SAVE = 2
    """Save the train state."""
    END = 4
    """Save the train state and end the run here."""


class Hooks:
    """What happens around the loop; the run's owner overrides what it needs. Every method is called on all workers."""

    def ask(self) -> Control:
        """Before a step, and in a validation: what this worker asks for. Only rank 0 may ask for anything."""
        return Control.NOTHING

    def on_step(self, progress: TrainProgress, step: Step) -> None:
        """After a step's update; ``progress`` is where the step began."""

    def wants_checkpoint(self, asked: Control) -> bool:
        """Whether what rank 0 asked for needs a checkpoint after this step."""
        return bool(asked & (Control.SAVE | Control.END))

    def on_log(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Every ``log_every`` steps, with the means since the last time."""

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """After a validation over exactly all validation examples."""

    def checkpoint(self, progress: TrainProgress) -> None:
        """Where the train state is to be saved."""

    @property
    def last_checkpoint(self) -> str | None:
        """URI of the newest checkpoint, for messages."""
        return None


class Trained(NamedTuple):
    """A step that was made and not yet read."""

    step: int
    epoch: int
    example_ids: list[torch.Tensor]
    """This worker's."""


def fit(
    engine: Engine, train: RankLoader, valid: RankLoader, progress: TrainProgress, config: TrainConfig, hooks: Hooks
) -> None:
    """Trains from ``progress`` to the end of the run, or until rank 0 asks to end, and keeps ``progress`` up to date.

    Where the validation split has no example, nothing is validated and no checkpoint is the best one. Raises
    :class:`NonFiniteLossError` naming the step, its example ids and the last good checkpoint.
    """
    total = total_steps(config, train)
    validates = valid.sampler.split.examples > 0
    if progress.unvalidated:
        if not _validated(engine, valid, progress, config, hooks):
            return
        hooks.checkpoint(progress)
    meter = Meter(total_steps=total, config=config)
    unread: list[Trained] = []
    while progress.step < total:
        last = min(train.steps, progress.epoch_step + total - progress.step)
        for step in meter.waiting(train.batches(progress.epoch, progress.epoch_step, last)):
            seed_dropout(config.seed, progress.step)
            engine.train_step(step)
            unread.append(Trained(progress.step, progress.epoch, [b.example_id_B for b in step.micro_batches]))
            hooks.on_step(progress, step)
            progress.step += 1
            progress.epoch_step += 1
            progress.examples = _examples_seen(progress, train)
            at_end = progress.step >= total or progress.epoch_step == train.steps
            due = _due(config.validate_every, progress.step) or _due(config.checkpoint_every, progress.step)
            logs = progress.step % config.log_every == 0 or at_end
            if not (logs or due or engine.wants_reading):
                continue
            try:
                results, ask = engine.read(hooks.ask())
            except NonFiniteLossError as error:
                raise _explained(error, unread[error.index], hooks) from None
            unread.clear()
            asked = Control(ask)
            progress.train_seconds += meter.add(results)
            if logs:
                hooks.on_log(progress, meter.take(progress))
            if progress.epoch_step == train.steps:
                progress.epoch += 1
                progress.epoch_step = 0
            if validates and (at_end or _due(config.validate_every, progress.step)):
                progress.unvalidated = True
                if Control.END in asked or not _validated(engine, valid, progress, config, hooks):
                    asked |= Control.END
                meter.restart()
            if at_end or due or hooks.wants_checkpoint(asked):
                hooks.checkpoint(progress)
                meter.restart()
            if Control.END in asked:
                return


def total_steps(config: TrainConfig, train: RankLoader) -> int:
    """Optimizer steps of the whole run."""
    steps = config.epochs * train.steps
    return steps if config.max_steps is None else min(steps, config.max_steps)


def _validated(engine: Engine, valid: RankLoader, progress: TrainProgress, config: TrainConfig, hooks: Hooks) -> bool:
    """Makes the validation that is due; False where rank 0 asks to end meanwhile, which leaves it due.

    Whoever stops a job waits seconds and a node that is taken away leaves minutes, which a validation may take itself:
    what rank 0 asks for is done in it, and a checkpoint that is saved in it holds that it is still due.
    """
    assert progress.unvalidated

    def ended() -> bool:
        asked = _asked(engine, hooks)
        if Control.END not in asked and hooks.wants_checkpoint(asked):
            hooks.checkpoint(progress)
        return Control.END in asked

    metrics = validate(engine, valid, config, ended)
    if metrics is None:
        return False
    progress.unvalidated = False
    hooks.on_validation(progress, metrics)
    return True


def validate(
    engine: Engine, loader: RankLoader, config: TrainConfig, ended: Callable[[], bool]
) -> dict[str, float] | None:
    """Losses over exactly all examples of a split, summed over the workers: means are over targets, not batches.

    None once ``ended``, which is asked every :data:`POLL_EVERY_BATCHES` batches on all workers.
    """
    nats = torch.zeros(2, dtype=torch.float64, device=engine.device)
    targets = examples = 0
    with closing(loader.batches(epoch=0)) as steps:
        for number, step in enumerate(steps):
            if number % POLL_EVERY_BATCHES == 0 and ended():
                return None
            for batch in step.micro_batches:
                nats += torch.stack(engine.evaluate(batch))
                targets += len(batch.target_N)
                examples += len(batch.example_id_B)
    sums = torch.cat([nats, nats.new_tensor([targets, examples])])
    dist.all_reduce(sums)
    dialogue, auxiliary, targets, examples = sums.tolist()
    assert examples == loader.sampler.split.examples, "validation must see every example exactly once"
    return {
        "dialogue_loss": dialogue / targets,
        "auxiliary_loss": auxiliary / targets,
        "loss": (dialogue + config.objective.lambda1 * auxiliary) / targets,
        "response_ppl": math.exp(min(dialogue / targets, 700.0)),
        "examples": examples,
    }


def _asked(engine: Engine, hooks: Hooks) -> Control:
    """What rank 0 asks for; all workers ask at the same batch, so that they do it, or leave, at the same one."""
    asked = torch.tensor(int(hooks.ask()), device=engine.device)
    dist.all_reduce(asked)
    return Control(int(asked))


def seed_dropout(seed: int, step: int) -> None:
    """Seeds torch for one step of one worker, so that a resumed run draws the dropout that it would have drawn."""
    state = np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0] >> 1))


@dataclass(kw_only=True)
class Meter:
    """Rates and means of the steps since the last log line."""

    total_steps: int
    config: TrainConfig
    results: list[StepResult] = field(default_factory=list)
    waited: float = 0.0
    started: float = field(default_factory=time.monotonic)
    added: float = field(default_factory=time.monotonic)

    def waiting(self, steps: Iterator[T]) -> Iterator[T]:
        """The same steps, with the time spent waiting for each one counted."""
        while True:
            begin = time.monotonic()
            step = next(steps, None)
            self.waited += time.monotonic() - begin
            if step is None:
                return
            yield step

    def add(self, results: list[StepResult]) -> float:
        """Counts the steps since the last time; gives their seconds, the wait for their data included."""
        self.results += results
        before, self.added = self.added, time.monotonic()
        return self.added - before

    def restart(self) -> None:
        """Forgets the steps and the clock, so that a validation or a save is not counted as training time."""
        self.results.clear()
        self.waited = 0.0
        self.started = self.added = time.monotonic()

    def take(self, progress: TrainProgress) -> dict[str, float]:
        """Means and rates since the last call, as MLflow names them, and starts anew."""
        elapsed = time.monotonic() - self.started
        n = len(self.results)
        last = self.results[-1]
        rate = n / elapsed
        metrics = {
            "train/loss": sum(r.loss for r in self.results) / n,
            "train/dialogue_loss": sum(r.dialogue for r in self.results) / n,
            "train/auxiliary_loss": sum(r.auxiliary for r in self.results) / n,
            "train/grad_norm": last.grad_norm,
            "train/lr": last.lr,
            "perf/examples_per_second": rate * self.config.batch_size,
            "perf/data_wait_share": self.waited / elapsed,
            "perf/memory_gib": memory_bytes() / 2**30,
            "perf/workers": dist.get_world_size(),
            "perf/eta_seconds": (self.total_steps - progress.step) / rate,
        }
        self.results.clear()
        self.waited = 0.0
        self.started = time.monotonic()
        return metrics


def memory_bytes() -> int:
    """Peak memory of this worker so far: the GPU's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()


def describe(progress: TrainProgress, metrics: dict[str, float], total_steps: int) -> str:
    """One log line of a training step."""
    m = metrics
    eta = _clock(m["perf/eta_seconds"])
    return (
        f"step {progress.step}/{total_steps} epoch {progress.epoch + 1} | "
        f"loss {m['train/loss']:.4f} (L_D {m['train/dialogue_loss']:.4f}, L_LM {m['train/auxiliary_loss']:.4f}) | "
        f"lr {m['train/lr']:.2e} | norm {m['train/grad_norm']:.3f} | {m['perf/examples_per_second']:.0f} examples/s | "
        f"data wait {m['perf/data_wait_share']:.1%} | {m['perf/memory_gib']:.2f} GiB | ETA {eta}"
    )


def _examples_seen(progress: TrainProgress, loader: RankLoader) -> int:
    in_epoch = min(progress.epoch_step * loader.sampler.batch_size, loader.sampler.split.examples)
    return progress.epoch * loader.sampler.split.examples + in_epoch


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def _explained(error: NonFiniteLossError, trained: Trained, hooks: Hooks) -> NonFiniteLossError:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [i for ids in trained.example_ids for i in ids.tolist()])
    ids = sorted(i for part in gathered for i in part)
    return NonFiniteLossError(
        f"step {trained.step + 1} of epoch {trained.epoch + 1}: {error}; the step was not applied. "
        f"Example ids: {ids}. Last good checkpoint: {hooks.last_checkpoint or 'none yet'}. "
        f"A lower --optimizer.lr is the usual cure"
    )
