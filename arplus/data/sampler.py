"""The order of a split's examples in an epoch. It depends on (seed, epoch) and the data alone, never on the workers.

1. The row groups of the split are put in a seeded order.
2. That sequence is cut into *windows* of ``window_batches`` global batches.
3. The rows of a window are shuffled and cut into global batches: random ones of the window, as the paper draws them
   from all its data.
4. Within a batch the rows are in order of context length, and are dealt out to ``M = workers × accumulation``
   micro-batches like cards: micro-batch ``m`` takes rows ``m, m + M, m + 2M, …``. So all have about as much to do, and
   one may have a row less than another; in an epoch's last batch, which is perhaps not full, some may have none.

For validation and evaluation nothing is shuffled, and a window is sorted by context length before it is cut.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from arplus import storage
from arplus.data.dataset import RowGroup, Split
from arplus.errors import UsageError

_DAMAGED = re.compile("Parquet (?:magic|file)|thrift|decompress|end of stream|[Cc]orrupt")
"""In what pyarrow says of a file that has come whole from where it is, and is not what it was."""


@dataclass(frozen=True, kw_only=True)
class EpochSampler:
    """The order of a split's examples, epoch by epoch: what it is, and the rows of any window of it."""

    split: Split
    batch_size: int
    """Examples per global batch."""
    window_batches: int
    seed: int
    shuffled: bool
    """Whether row groups and rows are shuffled; else they keep the order of the files, up to sorting in a window."""

    @property
    def steps(self) -> int:
        """Global batches per epoch, the last one perhaps not full."""
        return -(-self.split.examples // self.batch_size)

    @property
    def windows(self) -> int:
        """Windows per epoch."""
        return -(-self.steps // self.window_batches)

    def read(self, epoch: int, window: int, columns: list[str]) -> pa.Table:
        """The rows of a window in the order of the epoch's row groups, before they are shuffled or sorted."""
        parts = []
        for group, begin, rows in self.pieces(epoch, window):
            table = storage.with_retries(group.file, _read, group, columns)
            parts.append(table.slice(begin, rows))
        return pa.concat_tables(parts)

    def pieces(self, epoch: int, window: int) -> list[tuple[RowGroup, int, int]]:
        """The row groups that a window is in, each with the first row and the number of rows that it takes of it."""
        groups = self.split.row_groups
        order = self._random(epoch).permutation(len(groups)) if self.shuffled else np.arange(len(groups))
        ends = np.cumsum([groups[i].rows for i in order])
        first = window * self.window_batches * self.batch_size
        last = min(first + self.window_batches * self.batch_size, self.split.examples)
        pieces = []
        for i in range(int(np.searchsorted(ends, first, side="right")), int(np.searchsorted(ends, last)) + 1):
            group, end = groups[order[i]], int(ends[i])
            begin = max(first - (end - group.rows), 0)
            pieces.append((group, begin, min(last, end) - (end - group.rows) - begin))
        return pieces

    def batches(self, epoch: int, window: int, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Row numbers within the window of its global batches, in the order of training, from the contexts' lengths."""
        rows = self.order(epoch, window, lengths)
        return np.split(rows, range(self.batch_size, len(rows), self.batch_size))

    def order(self, epoch: int, window: int, lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """The same end to end."""
        n = len(lengths)
        rows = self._random(epoch, window).permutation(n) if self.shuffled else np.arange(n)
        batch = np.arange(n) // self.batch_size if self.shuffled else np.zeros(n, np.int64)
        return rows[np.lexsort((lengths[rows], batch))]

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key, len(key)])


def deal(
    rows: NDArray[np.int64], batch_size: int, workers: int, accumulation: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The rows of a window's global batches, dealt out: in the order of ``(worker, step, micro-batch)``.

    And how many rows each of these has, (workers, steps, accumulation). Within a micro-batch they keep their order.
    """
    M = workers * accumulation
    place = np.arange(len(rows))
    step, place = np.divmod(place, batch_size)
    sizes_S = np.bincount(step)
    sizes_SM = np.maximum(-((np.arange(M) - sizes_S[:, None]) // M), 0)
    sizes_WSA = sizes_SM.reshape(-1, workers, accumulation).swapaxes(0, 1)
    start_WSA = (np.cumsum(sizes_WSA) - sizes_WSA.ravel()).reshape(sizes_WSA.shape)
    start_SM = start_WSA.swapaxes(0, 1).reshape(sizes_SM.shape)
    dealt = np.empty_like(rows)
    dealt[start_SM[step, place % M] + place // M] = rows
    return dealt, sizes_WSA


def _read(group: RowGroup, columns: list[str]) -> pa.Table:
    filesystem, path = storage.resolve(group.file)
    with storage.translate_errors(group.file):
        try:
            with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
                return file.read_row_group(group.index, columns=columns, use_threads=False)
        except (pa.ArrowInvalid, OSError) as error:
            if _DAMAGED.search(problem := str(error).strip()):
                said = f"{group.file}: is damaged ({problem}); bring it back from a copy, or prepare the data again"
                raise UsageError(said) from None
            raise
