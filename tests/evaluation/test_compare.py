"""The bootstrap tells a difference from noise, and its metrics are those of the whole split."""

import numpy as np
import pytest

from arplus.config import special_ids
from arplus.evaluation.compare import METRICS, Sample, compare
from arplus.evaluation.metrics import StandardMetrics

SPECIAL = special_ids(60)


def sample(n: int, *, nats: float = 3.0, wrong: float = 0.5, seed: int = 0) -> Sample:
    """Replies of which a share of the characters is wrong; both parts of the examples in a shuffled order."""
    random = np.random.default_rng(seed)
    references = [[*random.integers(50, size=random.integers(4, 15)).tolist(), SPECIAL.eos] for _ in range(n)]
    replies = [[i if random.random() > wrong else 50 for i in row] for row in references]
    loss = [random.gamma(4, nats * len(row) / 4) for row in references]
    ids = random.permutation(n)
    parts = [
        Sample.of(
            SPECIAL,
            ids[half],
            np.array(loss)[half],
            np.array([len(references[i]) for i in half]),
            [replies[i] for i in half],
            [references[i] for i in half],
        )
        for half in (np.arange(n // 3), np.arange(n // 3, n))
    ]
    return Sample.together(parts)


def test_the_metrics_are_those_of_the_split() -> None:
    rows = [[1, 2, 3, 4, 5], [7, 8], [3, 3, 3]]
    references = [[1, 2, 3, 4, 6, SPECIAL.eos], [8, 7, 9, SPECIAL.eos], [*[4] * 30, SPECIAL.eos]]
    nats, targets = np.array([10.0, 12.0, 60.0]), np.array([6, 4, 31])
    whole = StandardMetrics(SPECIAL)
    whole.add(rows, references)
    whole.add_loss(82.0, 6 + 4 + 31)
    one = Sample.of(SPECIAL, np.arange(3), nats, targets, rows, references)
    found = compare(one, one, seed=0, resamples=20)
    for name in METRICS:
        assert found[name]["mine"] == pytest.approx(whole.result()[name]), name
        assert (found[name]["difference"], found[name]["noise"], found[name]["p"]) == (0, True, 1)


def test_a_planted_difference_is_found_and_none_is_not() -> None:
    mine = sample(400, nats=2.9, wrong=0.4)
    better = compare(mine, sample(400, nats=3.3, wrong=0.5), seed=1, resamples=300)
    assert better["response_ppl"]["high"] < 0
    assert better["bleu"]["low"] > 0
    assert better["f1"]["low"] > 0
    assert all(c["p"] < 0.05 and not c["noise"] for c in better.values())
    twins = [compare(sample(400, seed=i), sample(400, seed=i + 100), seed=i, resamples=200) for i in range(12)]
    assert sum(bool(twin["f1"]["noise"]) for twin in twins) >= 9, "95 % of them, but for chance"


def test_the_same_seed_gives_the_same_bounds() -> None:
    mine, other = sample(100), sample(100, wrong=0.6)
    assert compare(mine, other, seed=3, resamples=50) == compare(mine, other, seed=3, resamples=50)
    assert compare(mine, other, seed=3, resamples=50) != compare(mine, other, seed=4, resamples=50)


def test_other_examples_are_refused() -> None:
    mine = sample(10)
    with pytest.raises(AssertionError, match="the same examples"):
        compare(mine, Sample(mine.example_id + 1, mine.sums), seed=0, resamples=5)
