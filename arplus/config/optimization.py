"""What is minimised, and how: the losses' weights, AdamW, the schedule of its rate, and what is trained."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Lt


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L = λ0 · L_D + λ1 · L_LM (Eq. 4, where λ0 is 1), and λ2 · L_W where a persona weight is predicted (Eq. 3)."""

    lambda0: Annotated[float, Ge(0)] = 1.0
    """λ0, the weight of the response's loss L_D. With 0 only the auxiliary task is trained, and it decides which
    checkpoint is the best. Weights that it does not reach shrink by weight decay, unless --optimizer.only leaves them
    out."""
    lambda1: Annotated[float, Ge(0)] = 0.5
    """λ1, the weight of the auxiliary loss L_LM."""
    lambda2: Annotated[float, Ge(0)] = 0.5
    """λ2, the weight of L_W, the loss of --model.persona-weight predicted."""

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
    schedule: Literal["plateau", "linear"] = "plateau"
    """plateau lowers the rate whenever the training loss stops falling. linear raises it from 0 during the warm-up, and
    then lowers it to 0 at the run's end. If a run goes on with another --epochs or --max-steps, the line leads to the
    new end."""
    warmup: Annotated[int, Ge(0)] = 0
    """Steps of the linear schedule's warm-up."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Decoupled weight decay, on every parameter as in the paper's code."""
    max_grad_norm: Annotated[float, Gt(0)] = 1.0
    """Largest global gradient norm."""
    plateau_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Factor on the learning rate when the training loss has not improved for --optimizer.plateau-patience steps."""
    plateau_patience: Annotated[int, Ge(0)] = 60
    """Steps without a lower training loss before the plateau schedule lowers the rate."""
    min_lr: Annotated[float, Ge(0)] = 1.5e-4
    """Lowest learning rate of the plateau schedule."""
    eps: Annotated[float, Gt(0)] = 1e-6
    """AdamW's epsilon."""
    only: tuple[str, ...] = ()
    """Train only this component; --dry-run lists them. The others stay as they are when the run starts. By default all
    are trained."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.warmup and self.schedule != "linear":
            yield "warmup", f"is the linear schedule's: add --optimizer.schedule linear (got {self.warmup})"
