"""Where a run's workers may be: how much of a GPU each has, of which kind it is, and which nodes qualify."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from arplus.config.settings import Role, did_you_mean

_NAME = "[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL = re.compile(rf"(?:[a-z0-9.-]{{1,253}}/)?{_NAME}=!?(?:{_NAME}|in\({_NAME}(?:, ?{_NAME})*\))")
"""A label's key, and what is asked of its value: Ray's rules, which are Kubernetes'."""


@dataclass(frozen=True, kw_only=True)
class PlacementConfig:
    """Which part of which GPUs, on which nodes, a worker is given. May change whenever a run goes on."""

    gpus_per_worker: Annotated[float, Ge(0.05), Le(1), Role.OPERATION] = 1.0
    """Share of a GPU per worker. With 0.25, four runs of one worker each share a GPU that a small batch would leave
    idle. Workers of one training run cannot share a GPU, those of an evaluation can. On CPUs it changes nothing."""
    accelerator_type: Annotated[str | None, Role.OPERATION] = None
    """Take only GPUs of this kind, by Ray's name for it, such as L4 or A100."""
    label_selector: Annotated[tuple[str, ...], Role.OPERATION] = ()
    """Place workers only on nodes with this Ray label, given as KEY=VALUE. VALUE may be !A (not A), in(A,B) or
    !in(A,B)."""

    @property
    def runs_per_gpu(self) -> int:
        """Runs of one worker that fit on a GPU."""
        return int(1 / self.gpus_per_worker)

    @property
    def labels(self) -> dict[str, str]:
        """What ``label_selector`` asks of a node's labels, by key."""
        return {key: value for key, _, value in (item.partition("=") for item in self.label_selector)}

    @property
    def flags(self) -> str:
        """What chooses nodes, as on the command line; empty where all of them will do."""
        kind = [f"--accelerator-type {self.accelerator_type}"] if self.accelerator_type else []
        return " ".join([*kind, *(f"--label-selector {item}" for item in self.label_selector)])

    def device_problem(self, device: str) -> str | None:
        """What is wrong with ``accelerator_type`` beside ``--device``; None where nothing is."""
        wrong = self.accelerator_type is not None and device == "cpu"
        return "needs GPUs, and --device cpu takes none; leave one out" if wrong else None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        for item in self.label_selector:
            if not _LABEL.fullmatch(item):
                yield "label_selector", f"must be KEY=VALUE, where VALUE may be !A, in(A,B) or !in(A,B) (got {item!r})"
        if len(self.labels) < len(self.label_selector):
            yield "label_selector", "names a key twice; in(A,B) takes several values"


def accelerator_problem(name: str | None) -> str | None:
    """What is wrong with the name of an accelerator, with the nearest of Ray's names; None for one of them, or none."""
    if name is None:
        return None
    from ray.util import accelerators  # a second, for whoever names one

    names = {value for key, value in vars(accelerators).items() if isinstance(value, str) and not key.startswith("_")}
    if name in names:
        return None
    short = name.lower().removeprefix("nvidia").strip(" -_")
    meant = did_you_mean(short, {known.lower(): repr(known) for known in sorted(names)})
    said = f"got {name!r}{meant and f'; {meant}'}"
    return f"is not one of Ray's names of accelerators ({said}); some are A100, H100, L4, L40S and T4"
