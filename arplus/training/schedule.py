"""The learning rate of each step: the paper's plateau schedule, which follows the losses, or a line, which does not."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from arplus.config import OptimizerConfig

COUNTERS = ("best", "num_bad_epochs", "cooldown_counter", "last_epoch")


class Plateau(ReduceLROnPlateau):
    """The rate falls by a factor when the loss has not improved for some steps."""

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig) -> None:
        super().__init__(
            optimizer, factor=config.plateau_factor, patience=config.plateau_patience, min_lr=config.min_lr
        )

    @property
    def losses_to_spare(self) -> float:
        """Losses that may be told late: none of the next ones can change the rate before."""
        return self.patience - int(self.num_bad_epochs)

    def after_step(self) -> None:
        """Is called when a step was made."""

    def after_loss(self, loss: float) -> None:
        """Is called when a step's loss is known, which may be later."""
        self.step(loss)

    def state(self) -> dict[str, float]:
        """The rate of the next step, and the counters."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"])} | {key: getattr(self, key) for key in COUNTERS}

    def load(self, state: dict[str, float]) -> None:
        """Sets what :meth:`state` gave."""
        for group in self.optimizer.param_groups:
            group["lr"] = state["lr"]
        for key in COUNTERS:
            setattr(self, key, state[key])


class Linear:
    """The rate rises from 0 during the warm-up, then falls to 0 at the run's end, as in the paper's code."""

    losses_to_spare = math.inf

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig, steps: int) -> None:
        self.optimizer, self.lr, self.warmup, self.steps = optimizer, config.lr, config.warmup, steps
        self.load({"step": 0})

    def after_step(self) -> None:
        """The rate of the next step."""
        self.load({"step": self.step + 1})

    def after_loss(self, loss: float) -> None:
        """Losses change nothing."""

    def state(self) -> dict[str, float]:
        """How many steps were made. A run that goes on with another end has another line from there."""
        return {"lr": float(self.optimizer.param_groups[0]["lr"]), "step": self.step}

    def load(self, state: dict[str, float]) -> None:
        """Sets what :meth:`state` gave."""
        self.step = int(state["step"])
        rising = self.step / max(self.warmup, 1) if self.step < self.warmup else 1.0
        falling = max(self.steps - self.step, 0) / max(self.steps - self.warmup, 1)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * min(rising, falling)
