"""Histograms of what the sessions look like, for the data card."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from arplus.data.ragged import flat, list_lengths, offsets
from arplus.text import FEMALE, GENDERS, MALE

Histograms = dict[str, NDArray[np.int64]]
"""By name; how often each value 0, 1, … was seen. The last value stands for all from there on."""

LARGEST = {
    "characters_an_utterance": 2000,
    "utterances_a_session": 100,
    "profiles_a_session": 20,
    "tags_a_profile": 50,
    "gender": 2,
    "place": 3,
}
"""The last value of each histogram."""
MEANINGS = {"gender": ("missing", *GENDERS.values()), "place": ("missing", "其他", "海外", "in China")}
"""What the values of these mean."""


def histograms(sessions: pa.Table) -> Histograms:
    """The histograms of a table of sessions (:data:`arplus.data.sessions.SCHEMA`) without chunks."""
    utterances, profiles = flat(sessions["utterances"]), flat(sessions["profiles"])
    people = profiles.flatten()
    words, sizes = people.flatten(), list_lengths(people)
    starts = offsets(sizes)[:-1]
    gender, place = words.take(pa.array(starts)), words.take(pa.array(starts + 1))
    _, elsewhere, abroad, _ = MEANINGS["place"]
    places = [pc.equal(place, ""), pc.equal(place, elsewhere), pc.starts_with(place, abroad)]
    values = {
        "characters_an_utterance": _numbers(pc.utf8_length(utterances.flatten())),
        "utterances_a_session": list_lengths(utterances),
        "profiles_a_session": list_lengths(profiles),
        "tags_a_profile": sizes - 2,
        "gender": _numbers(pc.equal(gender, MALE)) + 2 * _numbers(pc.equal(gender, FEMALE)),
        "place": np.select([_numbers(holds) == 1 for holds in places], [0, 1, 2], 3),
    }
    return {
        name: np.bincount(np.minimum(values[name], largest), minlength=largest + 1) for name, largest in LARGEST.items()
    }


def empty() -> Histograms:
    """Histograms of nothing."""
    return {name: np.zeros(largest + 1, np.int64) for name, largest in LARGEST.items()}


@dataclass(frozen=True, kw_only=True)
class Distribution:
    """A histogram's mean, quantiles and largest value; all 0 for nothing."""

    n: int = 0
    mean: float = 0
    median: int = 0
    p75: int = 0
    p90: int = 0
    p95: int = 0
    p99: int = 0
    max: int = 0
    histogram: dict[int, int] = field(default_factory=dict)
    """How often each value was seen that was."""

    @classmethod
    def of(cls, counts: NDArray[np.int64]) -> "Distribution":
        """Of how often each value 0, 1, … was seen."""
        n = int(counts.sum())
        if not n:
            return cls()
        cumulative, seen = np.cumsum(counts), np.flatnonzero(counts)
        quantiles = {"median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}
        return cls(
            n=n,
            mean=round(float((counts * np.arange(len(counts))).sum() / n), 3),
            **{name: int(np.searchsorted(cumulative, q * n)) for name, q in quantiles.items()},
            max=int(seen[-1]),
            histogram={int(value): int(counts[value]) for value in seen},
        )


def _numbers(values: Any) -> NDArray[np.int64]:
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.int64)
