"""What is minimised, and how: the losses' weights, AdamW, the schedule of its rate, and what is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L = λ0 · L_D + λ1 · L_LM (Eq. 4, where λ0 is 1), and λ2 · L_W where a persona weight is predicted (Eq. 3)."""

    lambda0: Annotated[float, Ge(0)] = 1.0
    """λ0, the weight of the response's loss. With 0 the auxiliary task alone is trained, and the best checkpoint is the
    best at it; what it does not reach shrinks by weight decay unless optimizer.only leaves it out."""
    lambda1: Annotated[float, Ge(0)] = 0.5
    """λ1, the weight of the auxiliary loss."""
    lambda2: Annotated[float, Ge(0)] = 0.5
    """λ2, the weight of the loss of --model.persona-weight predicted."""

    @property
    def compared(self) -> str:
        """What validations are compared by, in words."""
        return "Response perplexity" if self.lambda0 else "Perplexity of the auxiliary task"

    def total(self, dialogue: Any, auxiliary: Any, weight: Any = 0.0) -> Any:
        """L of L_D, L_LM and L_W, or of sums over the same number."""
        return self.lambda0 * dialogue + self.lambda1 * auxiliary + self.lambda2 * weight

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.lambda0 and not self.lambda1:
            yield "lambda0", "and lambda1 must not both be 0: nothing would be trained"


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the paper uses it, and the schedule of its learning rate."""

    lr: Annotated[float, Gt(0)] = 2e-3
    """Highest learning rate."""
    eps: Annotated[float, Gt(0)] = 1e-6
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Decoupled weight decay, on every parameter as in the paper's code."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Largest global gradient norm."""
    schedule: Literal["plateau", "linear"] = "plateau"
    """plateau lowers the rate whenever the loss stops falling. linear raises it from 0 during the warm-up, and then
    lowers it to 0 at the run's end; a run that goes on with another --epochs or --max-steps follows its new line."""
    warmup: Annotated[int, Ge(0)] = 0
    """Steps of the linear schedule's warm-up."""
    plateau_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Factor on the learning rate when the training loss has not improved for plateau_patience steps."""
    plateau_patience: Annotated[int, Ge(0)] = 60
    """Steps without a better total loss before the learning rate falls."""
    min_lr: Annotated[float, Ge(0)] = 1.5e-4
    """Floor of the plateau schedule."""
    only: tuple[str, ...] = ()
    """Train only this component, of those that --dry-run lists (repeatable); by default all. The others stay as the run
    starts with them."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.warmup and self.schedule != "linear":
            yield "warmup", f"is the linear schedule's: add --optimizer.schedule linear (got {self.warmup})"
