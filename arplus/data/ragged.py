"""Lists of different lengths as flat arrays, the way Arrow stores them; and the way there and back."""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

Int = NDArray[np.integer]
Int64 = NDArray[np.int64]


def offsets(lengths: Int) -> Int64:
    """Where lists of these lengths start that lie end to end, and where the last one ends."""
    found = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=found[1:])
    return found


def ranges(starts: Int64, lengths: Int64) -> Int64:
    """The indices start, start + 1, … start + length - 1 of every list, one list after the other."""
    ends = np.cumsum(lengths)
    places = np.arange(ends[-1] if len(ends) else 0)
    places += np.repeat(starts - (ends - lengths), lengths)
    return places


def list_column(values: pa.Array, lengths: Int) -> pa.ListArray:
    """Lists of these lengths that lie end to end as an Arrow column."""
    return pa.ListArray.from_arrays(offsets(lengths).astype(np.int32), values)


class Lists(NamedTuple):
    """Lists end to end."""

    values: Int
    lengths: Int

    def joined(self, counts: Int) -> "Lists":
        """Consecutive lists as one, so many each time."""
        return Lists(self.values, np.diff(offsets(self.lengths)[offsets(counts)]))

    def to_arrow(self) -> pa.ListArray:
        """As a column of lists of 32-bit numbers."""
        return list_column(pa.array(self.values.astype(np.int32, copy=False)), self.lengths)


class Ragged(NamedTuple):
    """Lists anywhere in an array: list ``i`` is ``values[starts[i]:starts[i] + lengths[i]]``."""

    values: Int
    starts: Int64
    lengths: Int64

    @classmethod
    def end_to_end(cls, values: Int, lengths: Int) -> "Ragged":
        """Of lists that lie one after the other."""
        return cls(values, offsets(lengths)[:-1], lengths.astype(np.int64, copy=False))

    @classmethod
    def of(cls, column: pa.Array | pa.ChunkedArray) -> "Ragged":
        """Of an Arrow column of lists of numbers."""
        array = flat(column)
        return cls.end_to_end(array.flatten().to_numpy(), list_lengths(array))

    def places(self, rows_R: Int) -> tuple[Int64, Int64]:
        """Where the values of lists ``rows_R`` are, end to end, and how many each has."""
        lengths_R = self.lengths[rows_R]
        return ranges(self.starts[rows_R], lengths_R), lengths_R

    def take(self, rows_R: Int) -> Lists:
        """Lists ``rows_R`` in that order, end to end."""
        places, lengths_R = self.places(rows_R)
        return Lists(self.values[places], lengths_R)


def flat(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column in one piece."""
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def list_lengths(lists: pa.Array) -> Int64:
    """The length of each list of a column without nulls."""
    return np.diff(lists.offsets.to_numpy()).astype(np.int64)
