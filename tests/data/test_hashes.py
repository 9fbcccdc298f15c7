import numpy as np

from arplus.data.hashes import example_ids

RANDOM = np.random.default_rng(0)


def test_example_ids_are_distinct_and_not_negative() -> None:
    keys = RANDOM.integers(0, 2**64, (10_000, 2), dtype=np.uint64)
    ids = np.concatenate([example_ids(keys, np.full(len(keys), i)) for i in (1, 3, 5)])
    assert len(set(ids.tolist())) == 30_000
    assert ids.min() >= 0
    assert abs(np.mean(ids / 2**63) - 0.5) < 0.01
