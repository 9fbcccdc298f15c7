"""What a hook may do: methods that the loop calls, and what rank 0's may ask for.

A new hook is listed in ``make_hooks`` (``hooks/__init__.py``).
"""

from enum import IntFlag

from arplus.data.loader import Step
from arplus.runs.checkpoint import TrainProgress


class Request(IntFlag):
    """What rank 0 asks all workers for, at the end of a step. Only one worker may look at a clock or at storage."""

    NOTHING = 0
    LOOK = 1
    """See whether a node is to be taken away."""
    SAVE = 2
    """Save the train state."""
    END = 4
    """Save the train state and end the run here."""


class Hook:
    """Something that happens around the loop. Every method does nothing here; a hook overrides what it needs.

    Hooks that call collectives are in the list of every worker, in one order; others may be rank 0's alone. Nothing in
    a step may wait for the device or for storage.
    """

    def request(self) -> Request:
        """What rank 0 asks for; called on rank 0 alone, before results are read and in validations."""
        return Request.NOTHING

    def on_request(self, requested: Request) -> Request:
        """On all workers, with what rank 0 asked for: what this hook asks for thereupon, the same on all of them."""
        return Request.NOTHING

    def before_step(self, progress: TrainProgress) -> None:
        """Before a step, whose batch is there."""

    def after_step(self, progress: TrainProgress, step: Step) -> None:
        """After a step's update; ``progress`` is still where the step began."""

    def on_log(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Every ``log_every`` steps, with the means since the last time."""

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """After a validation over exactly all validation examples, which ``progress`` holds already."""

    def on_checkpoint(self, progress: TrainProgress) -> None:
        """Where the train state is to be saved."""

    def after_checkpoint(self, progress: TrainProgress, seconds: float) -> None:
        """After all hooks have done so; training stood still for these seconds."""

    @property
    def last_checkpoint(self) -> str | None:
        """URI of the newest checkpoint, from the hook that writes them."""
        return None

    def is_over(self, progress: TrainProgress) -> bool:
        """Whether the run ends here, before its last step; the same on all workers, and after a resume."""
        return False

    def finish(self) -> None:
        """After the last step: waits for what still runs, and raises what went wrong with it."""

    def close(self) -> None:
        """At the end, after an error too: lets go of what the hook holds."""
