"""A validation that is cut short is made up for, in the same place, by whoever goes on with the run; early stopping."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from arplus.config import ObjectiveConfig, TrainConfig, VocabularySizes
from arplus.data.loader import RankLoader, Step
from arplus.model.objective import Losses
from arplus.runs.checkpoint import TrainProgress
from arplus.training.engine import Engine, StepResult
from arplus.training.group import process_group
from arplus.training.hooks.base import Hook, Request
from arplus.training.hooks.requests import EarlyStopping
from arplus.training.loop import POLL_EVERY_BATCHES, fit

STEPS, VALID = 4, 3 * POLL_EVERY_BATCHES


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """This process as the only worker."""
    with process_group():
        yield


class Recorder(Hook):
    """Notes what happens; asks to end, or once to save, in the given validation batch."""

    def __init__(self, events: list[str], end_in: int | None = None, save_in: int | None = None) -> None:
        self.events = events
        self.end_in = end_in
        self.save_in = save_in
        self.validated = 0
        self.losses = lambda: Losses(torch.ones(()), torch.ones(()))
        self.saved: list[TrainProgress] = []

    def request(self) -> Request:
        if self.save_in is not None and self.validated >= self.save_in:
            self.save_in = None
            return Request.SAVE
        return Request.END if self.end_in is not None and self.validated >= self.end_in else Request.NOTHING

    def after_step(self, progress: TrainProgress, step: Step) -> None:
        self.events.append(f"step {progress.step + 1}")

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        assert metrics["examples"] == 2 * VALID
        self.events.append(f"validated {progress.step}")

    def on_checkpoint(self, progress: TrainProgress) -> None:
        self.saved.append(replace(progress))
        self.events.append(f"saved {progress.step} epoch {progress.epoch} step {progress.epoch_step}")


def run(progress: TrainProgress, hooks: Recorder, *more: Hook, **changes: Any) -> None:
    def loader(steps: int) -> RankLoader:
        batch = SimpleNamespace(example_id_B=torch.zeros(2), target_N=torch.zeros(2))

        def batches(epoch: int, first: int = 0, last: int | None = None) -> Iterator[Step]:
            for _ in range(first, steps if last is None else last):
                yield Step([cast(Any, batch)], 2)

        sampler = SimpleNamespace(batch_size=2, split=SimpleNamespace(examples=2 * steps))
        maker = SimpleNamespace(spec=SimpleNamespace(sizes=VocabularySizes()))
        return cast(RankLoader, SimpleNamespace(steps=steps, batches=batches, sampler=sampler, maker=maker))

    class Steps:
        device = torch.device("cpu")
        wants_reading = True

        def train_step(self, step: Step) -> None:
            pass

        def read(self, number: int) -> tuple[list[StepResult], int]:
            return [StepResult(1.0, 1.0, 1.0, 1.0, 0.1)], number

        def evaluate(self, batch: Any) -> Losses:
            hooks.validated += 1
            return hooks.losses()

    config = TrainConfig(batch_size=2, epochs=2, validate_every=2, **changes)
    fit(cast(Engine, Steps()), loader(STEPS), loader(VALID), progress, config, [hooks, *more])


@pytest.fixture
def undisturbed() -> list[str]:
    events: list[str] = []
    run(TrainProgress(fingerprint=""), Recorder(events))
    assert events[:4] == ["step 1", "step 2", "validated 2", "saved 2 epoch 0 step 2"]
    assert events[-2:] == ["validated 8", "saved 8 epoch 2 step 0"]
    return events


@pytest.mark.parametrize("validation", [1, 2, 4])
def test_a_validation_that_is_cut_short_is_made_up_for(undisturbed: list[str], validation: int) -> None:
    """After two steps, at the end of an epoch, and at the end of the run."""
    events: list[str] = []
    progress = TrainProgress(fingerprint="")
    first = Recorder(events, end_in=VALID * (validation - 1) + 2)
    run(progress, first)
    assert first.validated == VALID * (validation - 1) + POLL_EVERY_BATCHES, (
        "it ends at the next question, on all workers"
    )
    assert progress.unvalidated
    saved = events.pop()
    assert saved.startswith(f"saved {progress.step} ")
    assert events[-1] == f"step {progress.step}"
    run(progress, Recorder(events))
    assert not progress.unvalidated
    assert events == undisturbed


@pytest.mark.parametrize("validation", [1, 2, 4])
def test_a_validation_does_not_put_off_a_checkpoint(undisturbed: list[str], validation: int) -> None:
    """A node that is taken away leaves minutes, and a validation may take them; the run goes on from either save."""
    events: list[str] = []
    hooks = Recorder(events, save_in=VALID * (validation - 1) + 2)
    run(TrainProgress(fingerprint=""), hooks)
    early, late = hooks.saved[validation - 1 : validation + 1]
    assert (early.unvalidated, late.unvalidated) == (True, False)
    assert early.step == late.step
    where = f"saved {early.step} epoch {early.epoch} step {early.epoch_step}"
    at = events.index(where)
    assert events[at - 1 : at + 3] == [f"step {early.step}", where, f"validated {early.step}", where]
    assert events[:at] + events[at + 1 :] == undisturbed
    again: list[str] = events[:at]
    run(early, Recorder(again))
    assert again == undisturbed


def test_without_a_weight_for_the_reply_the_auxiliary_task_finds_the_best() -> None:
    """Which gets better here, while the reply's perplexity grows."""
    events: list[str] = []
    progress = TrainProgress(fingerprint="")
    hooks = Recorder(events)
    hooks.losses = lambda: Losses(torch.tensor(1.0 + hooks.validated), torch.tensor(9.0 - hooks.validated / VALID))
    run(progress, hooks, objective=ObjectiveConfig(lambda0=0.0))
    assert progress.validations_since_best == 0
    assert progress.best_response_ppl == progress.validation["auxiliary_ppl"]
    assert progress.validation["loss"] == 0.5 * progress.validation["auxiliary_loss"]


def test_who_is_told_to_end_again_leaves_it_due() -> None:
    events: list[str] = []
    progress = TrainProgress(fingerprint="", step=2, epoch_step=2, unvalidated=True)
    run(progress, Recorder(events, end_in=0))
    assert events == []
    assert progress.unvalidated


def test_validations_that_are_no_better_end_the_run_and_a_resume_counts_on(undisturbed: list[str]) -> None:
    """All validations here are equal: the first is the best one, and the third is the second that is not."""
    events: list[str] = []
    hooks = Recorder(events)
    run(TrainProgress(fingerprint=""), hooks, EarlyStopping(2))
    assert events == undisturbed[: undisturbed.index("validated 6") + 2]
    assert events[-1].startswith("saved 6 ")
    second, third = hooks.saved[1:]
    again: list[str] = []
    run(second, Recorder(again), EarlyStopping(2))
    assert again[-2:] == events[-2:]
    run(third, Recorder(again), EarlyStopping(2))
    assert again[-2:] == events[-2:], "started again, it makes no further step"
