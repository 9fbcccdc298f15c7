"""What the trials of a sweep differ in, by default and by ``NAME=uniform(LOW,HIGH)`` and the like: read and checked."""

import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from arplus.config.checks import unknown_key
from arplus.config.settings import Role, flag, names_of_role
from arplus.config.training import TrainConfig

Kind = Literal["uniform", "loguniform", "int", "choice"]
LARGEST_INT = 1 << 53
"""Whole numbers up to here are exact as floating-point numbers, which ranges are divided in."""
LEAST_NUMBERS = 1_000
"""Floating-point numbers that a range must hold."""
DEFAULT_SPACE = ("optimizer.lr=loguniform(1.5e-4,1e-2)", "objective.lambda1=uniform(0,1)")
"""What every sweep varies unless it is told otherwise: the learning rate above the paper's floor, and λ1."""
FORMS = (
    "NAME=uniform(LOW,HIGH), NAME=loguniform(LOW,HIGH), NAME=int(LOW,HIGH) or NAME=choice(A,B,…), "
    "or NAME=fixed for trials that all have the run's own value, which --NAME sets"
)


@dataclass(frozen=True)
class Dimension:
    """One setting in which trials differ."""

    name: str
    """The setting's dotted name."""
    kind: Kind
    values: tuple[Any, ...]
    """The lowest and the highest value, both possible; for a choice, all of them."""

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{self.name}={self.kind}({','.join(_shown(v) for v in self.values)})"

    def holds(self, value: Any) -> bool:
        """Whether ``value`` is possible."""
        if self.kind == "choice":
            return value in self.values
        return isinstance(value, int | float) and self.values[0] <= value <= self.values[1]

    def grid(self, points: int) -> list[Any]:
        """All choices, or ``points`` evenly spaced values, the ends among them; whole numbers are not repeated."""
        if self.kind == "choice":
            return list(self.values)
        return list(dict.fromkeys(self.at(i / (points - 1)) for i in range(points)))

    def at(self, share: float) -> Any:
        """The value at ``share`` (0 … 1) of the way from the lowest to the highest; not for a choice."""
        low, high = self.values[0], self.values[-1]
        if self.kind == "int":
            return round(low + share * (high - low))
        if share in (0, 1):  # to the bit, where the road over logarithms is not
            return (low, high)[int(share)]
        value = low * (high / low) ** share if self.kind == "loguniform" else low + share * (high - low)
        return min(max(value, low), high)  # rounding may step over an end


def parse_space(items: Sequence[str]) -> list[Dimension]:
    """The dimensions of :data:`DEFAULT_SPACE` and ``items``; a later one of the same name takes an earlier's place.

    Raises :class:`ValueError` naming the item and the problem.
    """
    found: dict[str, Dimension | None] = {}
    for item in (*DEFAULT_SPACE, *items):
        dimension = _parse(item)
        name = dimension.name if dimension else item.partition("=")[0].strip()
        found[name] = dimension
    dimensions = [dimension for dimension in found.values() if dimension]
    if not dimensions:
        raise ValueError("leaves nothing in which trials could differ")
    return dimensions


def _parse(item: str) -> Dimension | None:
    name, _, rest = (part.strip() for part in item.partition("="))
    name = name.replace("-", "_")
    valid = names_of_role(TrainConfig, Role.IDENTITY)
    if name not in valid:
        raise ValueError(f"{item}: {unknown_key(flag(name), [flag(n) for n in valid])}")
    if rest == "fixed":
        return None
    form = re.fullmatch(r"(uniform|loguniform|int|choice)\((.*)\)", rest)
    if form is None:
        raise ValueError(f"{item}: must be {FORMS}")
    kind: Any = form[1]
    values = tuple(parse_value(part.strip()) for part in form[2].split(","))
    if kind == "choice":
        if "" in values or len(set(map(repr, values))) < len(values):
            raise ValueError(f"{item}: needs choices that differ, with commas between them")
        return Dimension(name, kind, values)
    allowed: Any = int if kind == "int" else int | float
    if len(values) != 2 or not all(isinstance(v, allowed) and not isinstance(v, bool) for v in values):
        raise ValueError(f"{item}: needs {'two whole numbers' if kind == 'int' else 'two numbers'}, {kind}(LOW,HIGH)")
    if problem := bounds_problem(kind, *values):
        raise ValueError(f"{item}: {problem}")
    return Dimension(name, kind, values)


def bounds_problem(kind: Kind, low: float, high: float) -> str | None:
    """What makes a range one in which floating-point arithmetic finds no values; None where it does."""
    if kind == "int":
        if max(abs(low), abs(high)) > LARGEST_INT:
            return f"LOW and HIGH must be whole numbers of at most {LARGEST_INT:,} (2⁵³), either way"
        return None if low < high else "LOW must be below HIGH"
    try:
        low, high = float(low), float(high)
    except OverflowError:  # a whole number of more than 308 digits
        return "LOW must be below HIGH, and both finite"
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return "LOW must be below HIGH, and both finite"
    if kind == "loguniform" and low <= 0:
        return "LOW must be above 0 for loguniform"
    least = sys.float_info.min
    if any(0 < abs(v) < least for v in (low, high, high - low)):
        return f"LOW, HIGH and the range between them must be 0 or at least {least:.3g}, the least precise float"
    if not math.isfinite(high / low if kind == "loguniform" else high - low):
        return f"HIGH {'/' if kind == 'loguniform' else '-'} LOW must be below {sys.float_info.max:.3g}"
    if high - low < LEAST_NUMBERS * math.ulp(max(abs(low), abs(high))):
        return f"LOW and HIGH are so near that fewer than {LEAST_NUMBERS:,} floating-point numbers lie between them"
    return None


def parse_value(text: str) -> Any:
    """What a value on the command line is: None, True, False, a number, or the text itself."""
    words = {"None": None, "True": True, "False": False}
    if text in words:
        return words[text]
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if value is None or isinstance(value, bool | int | float | str) else text


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
