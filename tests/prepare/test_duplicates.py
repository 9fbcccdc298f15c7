"""Of equal sessions the first is kept, wherever the others lie."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arplus.prepare.duplicates import (
    MAX_SHARE,
    SPLITS,
    Boundaries,
    boundaries,
    duplicate_ids,
    lowest,
    partition,
    split_hash,
)

RANDOM = np.random.default_rng(0)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), max_size=30), st.randoms())
def test_the_lowest_id_of_equal_hashes_stays(pairs: list[tuple[int, int]], random: object) -> None:
    ids = list(range(len(pairs)))
    random.shuffle(ids)  # type: ignore[attr-defined]
    hashes = np.array(pairs, np.uint64).reshape(-1, 2)
    first: dict[tuple[int, int], int] = {}
    for pair, i in zip(pairs, ids, strict=True):
        first[pair] = min(i, first.get(pair, i))
    assert duplicate_ids(hashes, np.array(ids, np.int64)).tolist() == sorted(set(ids) - set(first.values()))


@pytest.mark.parametrize("partitions", [1, 3, 7])
def test_partitions_find_the_same_duplicates(partitions: int) -> None:
    hashes = RANDOM.integers(0, 2**64, (5000, 2), dtype=np.uint64)
    hashes[3000:] = hashes[RANDOM.integers(0, 3000, 2000)]
    ids = np.arange(5000)
    place = partition(hashes, partitions)
    assert set(place.tolist()) == set(range(partitions))
    found = np.concatenate([duplicate_ids(hashes[place == p], ids[place == p]) for p in range(partitions)])
    assert np.sort(found).tolist() == duplicate_ids(hashes, ids).tolist() == list(range(3000, 5000))


def assign(values: np.ndarray, valid: float, test: float) -> np.ndarray:
    return boundaries(valid, test, *lowest(values, valid=valid, test=test)).assign(values)


VALUES = split_hash(RANDOM.integers(0, 2**64, (40_000, 2), dtype=np.uint64))


@pytest.mark.parametrize("share", [0, 0.01, 0.03, MAX_SHARE, 0.5])
def test_a_share_is_kept_and_never_moves(share: float) -> None:
    split = assign(VALUES, share, share)
    for s in (1, 2):
        assert abs((split == s).mean() - min(share, MAX_SHARE)) < 0.005
    assert np.array_equal(assign(VALUES[:500], share, share), split[:500])


@pytest.mark.parametrize("number", [1, 10, 700])
def test_a_number_is_met_exactly_where_dialogues_differ(number: int) -> None:
    split = assign(VALUES, number, number)
    assert [(split == s).sum() for s in (1, 2)] == [number, number]


def test_a_number_is_at_most_five_per_cent() -> None:
    split = assign(VALUES, 20_000, 20_000)
    assert np.array_equal(split, assign(VALUES, MAX_SHARE, MAX_SHARE))


@pytest.mark.parametrize("number", [5, 300, 20_000])
def test_growth_only_releases_sessions_to_training(number: int) -> None:
    before, after = assign(VALUES[:10_000], number, number), assign(VALUES, number, number)[:10_000]
    moved = before != after
    assert (after[moved] == 0).all()


def test_equal_dialogues_stay_together() -> None:
    values = np.sort(VALUES)[[0, 1, 1, 1, 2]]  # the lowest of all: in the range of validation
    counts = [(assign(values, n, 0) == 1).sum() for n in (1, 2, 3, 4, 5)]
    assert counts == [1, 1, 1, 4, 5]


def test_partitions_decide_the_same_boundaries() -> None:
    parts = [lowest(part, valid=100, test=30) for part in np.array_split(VALUES, 7)]
    merged = boundaries(100, 30, np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts]))
    assert merged == boundaries(100, 30, *lowest(VALUES, valid=100, test=30))
    assert isinstance(merged, Boundaries)
    assert len(SPLITS) == 3
