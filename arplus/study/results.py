"""The rows of an ablation: means and deviations over seeds, and which differences are more than noise."""

import math
from collections.abc import Iterable, Mapping
from statistics import mean, stdev
from typing import Any, NamedTuple

from arplus.study.record import Trial

BASE = "arplus"
"""The row that every other preset is compared with."""


class Cell(NamedTuple):
    """One figure of a row, over its seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Cell | None":
        """Of the values of all seeds; None where there is none."""
        found = list(values)
        return cls(mean(found), stdev(found) if len(found) > 1 else None, len(found)) if found else None


class Key(NamedTuple):
    """What a row of the tables is made of."""

    sessions: int
    """Size of the training set."""
    preset: str
    """Its name: a preset's, or a variant's."""


def figures(trial: Trial) -> dict[str, float]:
    """All figures of a finished and evaluated run, by the names of :mod:`arplus.study.paper`'s columns."""
    final, evaluation = trial.final, trial.evaluation
    assert final is not None
    assert evaluation is not None
    found: dict[str, float] = {
        "parameters_m": evaluation.parameters / 1e6,
        "peak_memory_mib": final.peak_memory_bytes / 2**20,
        "train_minutes": final.train_seconds / 60,
        "examples": final.examples,
    }
    for group in ("paper_compatible", "standard", "persona"):
        found |= evaluation.splits["test"][group]
    return found


def rows(trials: Iterable[Trial]) -> dict[Key, dict[str, Cell]]:
    """The cells of every row of which a run was evaluated, by name."""
    seeds: dict[Key, list[dict[str, float]]] = {}
    for trial in trials:
        if trial.evaluation is not None:
            key = Key(trial.evaluation.sessions, trial.values.get("variant", trial.values["preset"]))
            seeds.setdefault(key, []).append(figures(trial))
    return {key: _cells(found) for key, found in sorted(seeds.items())}


def _cells(found: list[dict[str, float]]) -> dict[str, Cell]:
    names = dict.fromkeys(name for one in found for name in one)
    cells = {name: Cell.of(one[name] for one in found if name in one) for name in names}
    return {name: cell for name, cell in cells.items() if cell is not None}


def within_noise(mine: Cell, other: Cell) -> bool | None:
    """Whether two means differ by less than twice the standard error of their difference; None where one seed is all.

    A rule of thumb: with two or three seeds the deviations themselves are rough.
    """
    less = difference(mine, other)
    return None if less.deviation is None else abs(less.mean) <= 2 * less.deviation


def difference(mine: Cell, other: Cell) -> Cell:
    """A figure less another row's, with the standard error of that difference as its deviation."""
    error = None
    if mine.deviation is not None and other.deviation is not None:
        error = math.sqrt(mine.deviation**2 / mine.seeds + other.deviation**2 / other.seeds)
    return Cell(mine.mean - other.mean, error, min(mine.seeds, other.seeds))


def effect(row: Mapping[str, Cell], base: Mapping[str, Cell]) -> Cell | None:
    """By how many per cent a row's perplexity is above another's, with the deviation of the difference's mean."""
    mine, other = row.get("response_ppl"), base.get("response_ppl")
    if mine is None or other is None:
        return None
    ratio = mine.mean / other.mean
    deviation = None
    if mine.deviation is not None and other.deviation is not None:
        relative = (mine.deviation / mine.mean) ** 2 / mine.seeds + (other.deviation / other.mean) ** 2 / other.seeds
        deviation = 100 * ratio * math.sqrt(relative)
    return Cell(100 * (ratio - 1), deviation, min(mine.seeds, other.seeds))


def as_json(found: Mapping[Key, Mapping[str, Cell]]) -> list[dict[str, Any]]:
    """The rows as plain values."""
    return [{**key._asdict(), **{name: cell._asdict() for name, cell in cells.items()}} for key, cells in found.items()]
