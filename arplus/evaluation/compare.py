"""Two checkpoints on the same examples: is the difference more than noise? A paired bootstrap (Koehn 2004).

Examples are drawn with replacement, the same ones for both checkpoints, and the metrics computed anew, many times.
An example is the unit, so the intervals take the few examples of one session for independent.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arplus.config import SpecialIds
from arplus.evaluation.metrics import MAX_ORDER, NgramMatches, StandardMetrics

RESAMPLES = 1000
METRICS = ("response_ppl", "bleu", "f1")
"""The standard metrics that are sums over examples; Dist-n is not."""

_F1 = 2
_CORRECT = slice(3, 3 + MAX_ORDER)
_TOTAL = slice(_CORRECT.stop, _CORRECT.stop + MAX_ORDER)
_LENGTHS = slice(_TOTAL.stop, _TOTAL.stop + 2)
COLUMNS = _LENGTHS.stop


@dataclass(frozen=True)
class Sample:
    """What each example of a split gives to the metrics; shapes [n] and [n, COLUMNS]."""

    example_id: NDArray[np.int64]
    sums: NDArray[np.float64]
    """L_D and targets, F1, the n-grams of BLEU (correct, then all), characters of reply and reference."""

    @classmethod
    def of(
        cls,
        special: SpecialIds,
        example_id: NDArray[np.int64],
        nats: NDArray[np.floating],
        targets: NDArray[np.integer],
        replies: Sequence[Sequence[int]],
        references: Sequence[Sequence[int]],
    ) -> "Sample":
        """Of a batch: its ids, L_D of each example in nats and over how many targets, and rows for StandardMetrics."""
        sums = np.zeros((len(example_id), COLUMNS))
        for row, loss, count, reply, reference in zip(sums, nats, targets, replies, references, strict=True):
            one = StandardMetrics(special)
            one.add([reply], [reference])
            m = one.matches
            row[:3] = loss, count, one.f1_sum
            row[_CORRECT], row[_TOTAL], row[_LENGTHS] = m.correct, m.total, (m.reply_tokens, m.reference_tokens)
        return cls(example_id, sums)

    @classmethod
    def together(cls, parts: Sequence["Sample"]) -> "Sample":
        """All parts in order of example ids, which is the same order for every checkpoint."""
        ids = np.concatenate([part.example_id for part in parts])
        order = np.argsort(ids, kind="stable")
        return cls(ids[order], np.concatenate([part.sums for part in parts])[order])


def compare(mine: Sample, other: Sample, seed: int, resamples: int = RESAMPLES) -> dict[str, dict[str, float | bool]]:
    """For each of :data:`METRICS` both values, their difference (mine less the other's), and what is to be made of it.

    ``low`` and ``high`` bound the middle 95 % of the resampled differences; ``p`` is the share of them, doubled, on the
    far side of zero; ``noise`` is whether zero is within the bounds.
    """
    assert (mine.example_id == other.example_id).all(), "both must have seen the same examples"
    random = np.random.default_rng(seed)
    n = len(mine.example_id)
    drawn = np.empty((resamples, len(METRICS)))
    for row in drawn:
        weights = np.bincount(random.integers(n, size=n), minlength=n)
        row[:] = np.subtract(_metrics(weights @ mine.sums, n), _metrics(weights @ other.sums, n))
    found: dict[str, dict[str, float | bool]] = {}
    values = zip(METRICS, _metrics(mine.sums.sum(0), n), _metrics(other.sums.sum(0), n), drawn.T, strict=True)
    for name, a, b, differences in values:
        low, high = np.quantile(differences, [0.025, 0.975])
        beyond = min((differences <= 0).mean(), (differences >= 0).mean())
        found[name] = {
            "mine": a,
            "other": b,
            "difference": a - b,
            "low": float(low),
            "high": float(high),
            "p": float(min(1.0, 2 * beyond)),
            "noise": bool(low <= 0 <= high),
        }
    return found


def _metrics(sums: NDArray[np.float64], n: int) -> tuple[float, float, float]:
    counts = sums[_CORRECT.start :].astype(int)
    correct, total, lengths = np.split(counts, [MAX_ORDER, 2 * MAX_ORDER])
    bleu = NgramMatches(correct, total, *lengths.tolist()).bleu()
    return float(np.exp(min(sums[0] / sums[1], 700.0))), float(bleu), float(sums[_F1] / n)


def lines(comparison: dict[str, dict[str, float | bool]]) -> list[str]:
    """A comparison as lines to read."""
    found = [f"  {'':14} {'mine':>10} {'other':>10} {'difference':>11} {'95 % of resamples':>23} {'p':>7}"]
    for name, c in comparison.items():
        values = f"{c['mine']:10.4f} {c['other']:10.4f} {c['difference']:+11.4f}"
        bounds, remark = f"{c['low']:+.4f} … {c['high']:+.4f}", "  within noise" if c["noise"] else ""
        found.append(f"  {name:14} {values} {bounds:>23} {c['p']:7.3f}{remark}")
    return found
