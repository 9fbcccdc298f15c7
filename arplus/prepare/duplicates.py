"""Finds sessions with equal hashes, which ``tasks`` leaves out when it reads them again, and the split of each.

What is hashed is said by ``data.records`` and ``data.sessions``.

A split is a range of a salted hash of the dialogue: validation owns the lowest 5 % of the range, test the next 5 %,
training the rest. So equal dialogues share a split whatever their profiles, and the split of a session depends on
nothing but its text. With a share s, a split is the lowest s of the range and never moves. With a number N, it is
the N sessions (or fewer, since equal dialogues stay together) with the lowest hashes of the split's range, and the
rest of the range is training data: when data grows, sessions may be released to training, but none that was
trained on ever enters validation or test.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from arplus.data.hashes import mix

SPLITS = ("train", "valid", "test")
"""The splits of a prepared data set."""
MAX_SHARE = 0.05
"""The share of the dialogues that validation and test can take at most, each."""

_RANGE = int(MAX_SHARE * 2**64)
_SPLIT_SALT = 0x6172706C75730001  # "arplus", 1: the split must not follow the hash that rows are ordered by


def partition(hashes: NDArray[np.uint64], partitions: int) -> NDArray[np.int64]:
    """The partition 0 … partitions - 1 of each hash [n, 2]: equal ranges of its first 32 bits."""
    return (((hashes[:, 0] >> np.uint64(32)) * np.uint64(partitions)) >> np.uint64(32)).astype(np.int64)


def duplicate_ids(hashes: NDArray[np.uint64], ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ids of all rows but the one with the lowest id of each group of equal hashes [n, 2], in rising order."""
    order = np.argsort(hashes[:, 0])
    first = hashes[order, 0]
    same = first[1:] == first[:-1]
    if not same.any():
        return np.empty(0, np.int64)
    candidates = order[np.append(same, False) | np.insert(same, 0, False)]  # few: only these need the full order
    high, low, rows = hashes[candidates, 0], hashes[candidates, 1], ids[candidates]
    order = np.lexsort((rows, low, high))
    repeated = (high[order][1:] == high[order][:-1]) & (low[order][1:] == low[order][:-1])
    return np.sort(rows[order][1:][repeated])


def membership(hashes: NDArray[np.uint64], known: NDArray[np.uint64]) -> NDArray[np.int32]:
    """For each hash [n, 2] the first row of ``known`` [m, 2] that equals it, -1 for none."""
    found = np.full(len(hashes), -1, np.int32)
    candidates = np.flatnonzero(np.isin(hashes[:, 0], known[:, 0]))  # few: only these are compared in full
    rows = {(high, low): i for i, (high, low) in reversed(list(enumerate(known.tolist())))} if len(candidates) else {}
    found[candidates] = [rows.get((high, low), -1) for high, low in hashes[candidates].tolist()]
    return found


def split_hash(dialogue_hashes: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The value [n] that decides the split, from dialogue hashes [n, 2]."""
    return mix(dialogue_hashes[:, 0] ^ np.uint64(_SPLIT_SALT))


@dataclass(frozen=True)
class Boundaries:
    """Where the splits end in the range of :func:`split_hash`."""

    valid: int
    """Validation is [0, valid)."""
    test: int
    """Test is [5 % of the range, test)."""

    def assign(self, values: NDArray[np.uint64]) -> NDArray[np.int8]:
        """For each split hash the index into :data:`SPLITS`."""
        split = np.zeros(len(values), np.int8)
        split[values < np.uint64(self.valid)] = 1
        split[(values >= np.uint64(_RANGE)) & (values < np.uint64(self.test))] = 2
        return split


def lowest(values: NDArray[np.uint64], *, valid: float, test: float) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The split hashes, in order, that can decide where validation and test end; none where a share decides."""
    in_test = values[(values >= np.uint64(_RANGE)) & (values < np.uint64(2 * _RANGE))]
    return _first(values[values < np.uint64(_RANGE)], valid), _first(in_test, test)


def boundaries(
    valid: float, test: float, valid_values: NDArray[np.uint64], test_values: NDArray[np.uint64]
) -> Boundaries:
    """Where the splits end for a share (below 1) or a number each, given all that :func:`lowest` returned."""
    return Boundaries(_end(0, valid, valid_values), _end(_RANGE, test, test_values))


def _first(values: NDArray[np.uint64], wanted: float) -> NDArray[np.uint64]:
    return np.sort(values)[: int(wanted) + 1] if wanted >= 1 else values[:0]


def _end(start: int, wanted: float, values: NDArray[np.uint64]) -> int:
    if wanted < 1:
        return start + min(int(wanted * 2**64), _RANGE)
    values = _first(values, wanted)
    # The first value that is one too many ends the split, so that dialogues equal to it stay together.
    return int(values[int(wanted)]) if len(values) > wanted else start + _RANGE
