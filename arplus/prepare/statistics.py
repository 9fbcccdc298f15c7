"""Histograms of what the sessions look like, for the data card."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from arplus.text import FEMALE, MALE

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
GENDERS = ("missing", "男", "女")
"""What the values of `gender` mean."""
PLACES = ("missing", "其他", "海外", "in China")
"""What the values of `place` mean."""


def histograms(sessions: pa.Table) -> Histograms:
    """The histograms of a table of sessions (:data:`arplus.data.sessions.SCHEMA`) without chunks."""
    utterances, profiles = (sessions[name].combine_chunks() for name in ("utterances", "profiles"))
    people = profiles.flatten()
    words, sizes = people.flatten(), _numbers(pc.list_value_length(people))
    starts = np.cumsum(sizes) - sizes
    gender, place = words.take(pa.array(starts)), words.take(pa.array(starts + 1))
    values = {
        "characters_an_utterance": _numbers(pc.utf8_length(utterances.flatten())),
        "utterances_a_session": _numbers(pc.list_value_length(utterances)),
        "profiles_a_session": _numbers(pc.list_value_length(profiles)),
        "tags_a_profile": sizes - 2,
        "gender": _numbers(pc.equal(gender, MALE)) + 2 * _numbers(pc.equal(gender, FEMALE)),
        "place": np.select(
            [
                _numbers(pc.equal(place, "")) == 1,
                _numbers(pc.equal(place, PLACES[1])) == 1,
                _numbers(pc.starts_with(place, PLACES[2])) == 1,
            ],
            [0, 1, 2],
            3,
        ),
    }
    return {
        name: np.bincount(np.minimum(values[name], largest), minlength=largest + 1) for name, largest in LARGEST.items()
    }


def empty() -> Histograms:
    """Histograms of nothing."""
    return {name: np.zeros(largest + 1, np.int64) for name, largest in LARGEST.items()}


def add(total: Histograms, more: Histograms) -> None:
    """Adds the second to the first."""
    for name, counts in more.items():
        total[name] += counts


def summary(counts: NDArray[np.int64]) -> dict[str, float]:
    """Mean, quantiles and largest value of a histogram; all 0 for nothing."""
    n = int(counts.sum())
    if not n:
        return dict.fromkeys(("n", "mean", "median", "p75", "p90", "p95", "p99", "max"), 0)
    cumulative = np.cumsum(counts)
    quantiles = {"median": 0.5, "p75": 0.75, "p90": 0.9, "p95": 0.95, "p99": 0.99}
    return {
        "n": n,
        "mean": round(float((counts * np.arange(len(counts))).sum() / n), 3),
        **{name: int(np.searchsorted(cumulative, q * n)) for name, q in quantiles.items()},
        "max": int(np.flatnonzero(counts)[-1]),
    }


def _numbers(values: Any) -> NDArray[np.int64]:
    return np.asarray(values.to_numpy(zero_copy_only=False)).astype(np.int64)
