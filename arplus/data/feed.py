"""One worker's batches of a split, prepared by Ray Data tasks ahead of the training step.

The order of an epoch depends on (seed, epoch) and the data alone, never on the number of workers:

1. the row groups of the split are put in a seeded order;
2. that sequence is cut into *windows* of ``window_batches`` global batches;
3. the rows of a window are shuffled, sorted by length (so padding stays small) and cut into global batches, whose
   order is shuffled again;
4. micro-batch ``m`` of ``M = workers × accumulation`` takes every M-th row of a global batch from row ``m`` on.

One Ray Data task makes the micro-batches of one worker from one window. An epoch therefore starts anywhere: at step
``s`` the feed begins with window ``s // window_batches``. Every worker takes the same number of steps by
construction, and ``local_shuffle_buffer_size`` and ``streaming_split`` are not used: the first yields short batches in
mid-stream (ray#66085), the second drops rows (ray#63285). The last batch of an epoch is filled up with repeated rows
that are not counted.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from ray.data import DataContext

from arplus import storage
from arplus.config import FeedConfig
from arplus.data.collate import Draws, Layout, Window
from arplus.data.dataset import Split
from arplus.model.batch import Batch

TASK_CPUS = 0.5
"""Logical CPUs of one window task: two run at once on the one CPU that is always left to the feed."""


class Step(NamedTuple):
    """One worker's part of an optimizer step."""

    micro_batches: list[Batch]
    """This worker's micro-batches, on the CPU."""
    targets: int
    """Real targets ([EOS] included) of the whole global batch: the count that every worker divides its loss by."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Which micro-batches of every global batch one worker takes."""

    rank: int = 0
    workers: int = 1
    accumulation: int = 1

    @property
    def micro_batches(self) -> range:
        """Indices of this worker's micro-batches among the ``workers × accumulation`` of a global batch."""
        return range(self.rank * self.accumulation, (self.rank + 1) * self.accumulation)


@dataclass(frozen=True, kw_only=True)
class Order:
    """The order of a split's examples, epoch by epoch: what it is, and the rows of any window of it."""

    split: Split
    batch_size: int
    """Examples a global batch."""
    window_batches: int
    seed: int
    shuffled: bool
    """Whether row groups, rows and batches are shuffled; validation and test keep the file order up to sorting."""

    @property
    def steps(self) -> int:
        """Global batches an epoch, the last one perhaps not full."""
        return -(-self.split.examples // self.batch_size)

    @property
    def windows(self) -> int:
        """Windows an epoch."""
        return -(-self.steps // self.window_batches)

    def read(self, epoch: int, window: int, columns: list[str]) -> pa.Table:
        """The rows of a window in the order of the epoch's row groups, before they are sorted."""
        groups = self.split.row_groups
        order = self._random(epoch).permutation(len(groups)) if self.shuffled else np.arange(len(groups))
        ends = np.cumsum([groups[i].rows for i in order])
        first = window * self.window_batches * self.batch_size
        last = min(first + self.window_batches * self.batch_size, self.split.examples)
        parts = []
        for group, end in zip((groups[i] for i in order), ends, strict=True):
            start = end - group.rows
            if end > first and start < last:
                filesystem, path = storage.resolve(group.file)
                with pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
                    table = file.read_row_group(group.index, columns=columns, use_threads=False)
                begin = max(first - start, 0)
                parts.append(table.slice(begin, min(last, end) - start - begin))
        return pa.concat_tables(parts)

    def batches(self, epoch: int, window: int, lengths: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Row numbers within the window of its global batches, in the order of training, from the rows' lengths."""
        random = self._random(epoch, window)
        rows = random.permutation(len(lengths)) if self.shuffled else np.arange(len(lengths))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))] if self.shuffled else batches

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key, len(key)])


class Feed:
    """The batches of one worker. Iterating needs a running Ray; see the module's docstring for the order."""

    def __init__(self, order: Order, layout: Layout, place: Place, config: FeedConfig) -> None:
        """Raises an assertion error where the global batch does not divide into equal micro-batches."""
        assert order.batch_size % (place.workers * place.accumulation) == 0
        self.order = order
        self.layout = layout
        self.place = place
        self.config = config

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return self.order.steps

    def batches(self, epoch: int, first: int = 0, last: int | None = None) -> Iterator[Step]:
        """The steps ``first`` to ``last - 1`` of an epoch; to its end by default.

        Exhaust the iterator: Ray Data leaks the executor of one that is left early (ray#62949).
        """
        last = self.steps if last is None else last
        first_window, skip = divmod(first, self.order.window_batches)
        left = last - first
        dataset = self._dataset(epoch, range(first_window, -(-last // self.order.window_batches)))
        for table in dataset.iter_batches(
            batch_size=None, batch_format="pyarrow", prefetch_batches=self.config.prefetch
        ):
            assert isinstance(table, pa.Table)
            rows = table.slice(skip, left)
            skip = 0
            left -= len(rows)
            for row in rows.to_pylist():
                yield Step([_batch(micro_batch) for micro_batch in row["micro_batches"]], row["targets"])

    def _dataset(self, epoch: int, windows: range) -> ray.data.Dataset:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True  # ray#35053
        # A block of ``range`` is one row here, so one window is one task.
        return ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
            functools.partial(_prepare, windows.start, epoch, self.order, self.layout, self.place),
            batch_size=None,
            num_cpus=TASK_CPUS,
        )


def _prepare(first_window: int, epoch: int, order: Order, layout: Layout, place: Place, item: Any) -> pa.Table:
    (index,) = item["id"]
    return prepare_window(epoch, first_window + int(index), order, layout, place)


def prepare_window(epoch: int, index: int, order: Order, layout: Layout, place: Place) -> pa.Table:
    """The steps of window ``index`` for one worker, a row a step; :func:`_batch` reads a row's micro-batches."""
    window = Window(order.read(epoch, index, layout.columns), layout)
    n_micro = place.workers * place.accumulation
    size = order.batch_size // n_micro
    draws = Draws(order.seed, epoch if order.shuffled else 0)
    steps, targets = [], []
    for rows in order.batches(epoch, index, window.lengths):
        micro_batches = []
        for m in place.micro_batches:
            own = rows[m::n_micro]
            # Only the epoch's last batch may be short; it repeats its first row, not counted.
            filler = np.full(size - len(own), rows[0])
            counted = np.arange(size) < len(own)
            micro_batches.append(_serialise(window.batch(np.concatenate([own, filler]), counted, draws)))
        steps.append(micro_batches)
        targets.append(int(window.response.lengths[rows].sum()) + len(rows))
    return pa.table({"micro_batches": steps, "targets": targets})


def _serialise(arrays: dict[str, NDArray[Any]]) -> list[dict[str, Any]]:
    return [
        {"name": name, "dtype": array.dtype.str, "shape": list(array.shape), "data": array.tobytes()}
        for name, array in arrays.items()
    ]


def as_batch(arrays: dict[str, NDArray[Any]]) -> Batch:
    """A :class:`Batch` of the arrays that :meth:`arplus.data.collate.Window.batch` gives."""
    tensors: dict[str, Any] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    return Batch(**{"infilled_BU": None, **tensors})


def _batch(fields: list[dict[str, Any]]) -> Batch:
    return as_batch({f["name"]: np.frombuffer(bytearray(f["data"]), f["dtype"]).reshape(f["shape"]) for f in fields})
