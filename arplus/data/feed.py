"""One worker's batches of a split, prepared by Ray Data tasks ahead of the training step.

The order of an epoch depends on (seed, epoch) and the data alone, never on the number of workers:

1. the row groups of the split are put in a seeded order;
2. that sequence is cut into *windows* of ``window_batches`` global batches;
3. the rows of a window are shuffled, sorted by the length of their contexts, cut into bands of a few batches, sorted
   by the length of their responses within these (so padding stays small in both) and cut into global batches, whose
   order is shuffled again;
4. micro-batch ``m`` of ``M = workers × accumulation`` takes every M-th row of a global batch from row ``m`` on. Rows
   that are repeated and not counted fill up what is missing to M equal parts, and the last batch of an epoch.

One Ray Data task makes the micro-batches of one worker from one window. An epoch therefore starts anywhere: at step
``s`` the feed begins with window ``s // window_batches``. Every worker takes the same number of steps by
construction, and ``local_shuffle_buffer_size`` and ``streaming_split`` are not used: the first yields short batches in
mid-stream (ray#66085), the second drops rows (ray#63285).

A window travels as a few flat arrays, which the worker copies once (into pinned memory where there is a GPU) and cuts
into tensors. A thread of the worker does so ahead of the training step.
"""

import functools
import math
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray
from ray.data import DataContext

from arplus import storage
from arplus.config import FeedConfig
from arplus.data.collate import CONTEXT_UNIT, EXACT, Arrays, Draws, Layout, Widths, Window
from arplus.data.dataset import RowGroup, Split
from arplus.model.batch import Batch

S = TypeVar("S")
T = TypeVar("T")

TASK_CPUS = 1
"""Logical CPUs of one window task. With half of one there were more tasks at once than Ray keeps idle processes (one a
CPU), so that it ended and started them all the time: 45 k examples/s instead of 115 k on the same busy machine."""


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
        parts = []
        for group, begin, rows in self.pieces(epoch, window):
            table = storage.patiently(group.file, functools.partial(_read, group, columns))
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
        """Row numbers within the window of its global batches, in the order of training, from the rows' lengths."""
        random = self._random(epoch, window)
        rows = random.permutation(len(lengths)) if self.shuffled else np.arange(len(lengths))
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        # Bands of half the square root of the window's batches, sorted by response: of 256 batches of 64 it leaves 4 %
        # padding in contexts and 6 % in responses, of which a slot costs three times as much to train on: 5 % of the
        # layers' work. Sorted by context and only then by response it was 1 % and 21 %: 14 % of the work.
        band = self.batch_size * max(math.isqrt(len(rows) // self.batch_size) // 2, 1)
        bands = [rows[i : i + band] for i in range(0, len(rows), band)]
        rows = np.concatenate([part[np.argsort(lengths[part] % CONTEXT_UNIT, kind="stable")] for part in bands])
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        return [batches[i] for i in random.permutation(len(batches))] if self.shuffled else batches

    def _random(self, *key: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *key, len(key)])


class Feed:
    """The batches of one worker. Iterating needs a running Ray; see the module's docstring for the order."""

    def __init__(self, order: Order, layout: Layout, place: Place, config: FeedConfig, widths: Widths = EXACT) -> None:
        assert order.batch_size >= place.workers * place.accumulation
        self.order = order
        self.layout = layout
        self.place = place
        self.config = config
        self.widths = widths

    @property
    def steps(self) -> int:
        """Optimizer steps an epoch."""
        return self.order.steps

    def batches(self, epoch: int, first: int = 0, last: int | None = None) -> Generator[Step, None, None]:
        """The steps ``first`` to ``last - 1`` of an epoch; to its end by default.

        Windows become tensors in the background. Whoever leaves the iterator early closes it (an error in a for loop
        around it does), and with it the thread and Ray Data's executor.
        """
        last = self.steps if last is None else last
        first_window, skip = divmod(first, self.order.window_batches)
        dataset = self._dataset(epoch, range(first_window, -(-last // self.order.window_batches)))
        tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=self.config.prefetch)
        decode = functools.partial(_from_table, pin=torch.cuda.is_available())
        n = self.place.accumulation
        with closing(read_ahead(cast(Generator[pa.Table, None, None], iter(tables)), decode)) as windows:
            # Ray Data cuts a large window's table in two, perhaps within a step.
            micro_batches = islice(chain.from_iterable(windows), skip * n, (skip + last - first) * n)
            while parts := list(islice(micro_batches, n)):
                yield Step([batch for batch, _ in parts], parts[0][1])

    def _dataset(self, epoch: int, windows: range) -> ray.data.Dataset:
        context = DataContext.get_current()
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True  # ray#35053
        # A block of ``range`` is one row here, so one window is one task.
        return ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
            functools.partial(_prepare, windows.start, epoch, self),
            batch_size=None,
            num_cpus=TASK_CPUS,
        )


def _read(group: RowGroup, columns: list[str]) -> pa.Table:
    filesystem, path = storage.resolve(group.file)
    with storage.named(group.file), pq.ParquetFile(path, filesystem=filesystem, pre_buffer=True) as file:
        return file.read_row_group(group.index, columns=columns, use_threads=False)


def _prepare(first_window: int, epoch: int, feed: Feed, item: Any) -> pa.Table:
    (index,) = item["id"]
    return prepare_window(epoch, first_window + int(index), feed)


def prepare_window(epoch: int, index: int, feed: Feed) -> pa.Table:
    """The micro-batches of one worker from window ``index``, a row each; :func:`_from_table` reads them."""
    order, place = feed.order, feed.place
    window = Window(order.read(epoch, index, feed.layout.columns), feed.layout)
    batches = order.batches(epoch, index, window.lengths)
    n_micro, own = place.workers * place.accumulation, place.micro_batches
    size = -(-order.batch_size // n_micro) * n_micro
    # What a batch lacks to equal parts, and the epoch's last batch to its size, is its first row again, not counted.
    rows_SB = np.stack([np.append(rows, np.full(size - len(rows), rows[0])) for rows in batches])
    counted_SB = np.arange(size) < np.array([[len(rows)] for rows in batches])
    targets_S = ((window.response.lengths[rows_SB] + 1) * counted_SB).sum(1)

    def micro_batches(array_SB: NDArray[Any]) -> NDArray[Any]:
        S, B = array_SB.shape
        array_SMB = array_SB.reshape(S, B // n_micro, n_micro).swapaxes(1, 2)[:, own.start : own.stop]
        return array_SMB.reshape(S * len(own), -1)

    rows_NB, counted_NB = micro_batches(rows_SB), micro_batches(counted_SB)
    draws = Draws(order.seed, epoch if order.shuffled else 0)
    fields = window.batches(rows_NB, draws, feed.widths)
    fields["counted_B"] = Arrays(counted_NB.ravel().view(np.uint8), [rows_NB.shape[1:]] * len(rows_NB))
    ids_fit = max(feed.layout.sizes.characters, feed.layout.sizes.persona_words) <= 1 << 16
    return _to_table(fields, np.repeat(targets_S, len(own)), np.uint16 if ids_fit else np.int32)


def read_ahead(items: Generator[S, None, None], make: Callable[[S], T]) -> Generator[T, None, None]:
    """``make(item)`` of every item, made by a thread that is one ahead; its errors are raised here.

    A window at a time: a hand-over a step would cost 0.1 ms.
    """

    def following() -> T | None:
        item = next(items, None)
        return None if item is None else make(item)

    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        made = thread.submit(following)
        while (result := made.result()) is not None:
            made = thread.submit(following)
            yield result


def _to_table(fields: dict[str, Arrays], targets: NDArray[np.int64], id_type: type[np.integer]) -> pa.Table:
    """Batches as a table of a row a batch, with ids as narrow as they may be: moving them costs more than anything."""
    columns: dict[str, Any] = {"targets": targets}
    for name, (values, shapes) in fields.items():
        ends = np.cumsum([math.prod(shape) for shape in shapes])
        values = values.astype(id_type) if values.dtype == np.int32 else values
        columns[name] = pa.ListArray.from_arrays(pa.array(np.append(0, ends), pa.int32()), pa.array(values))
        columns[f"{name}.shape"] = pa.FixedSizeListArray.from_arrays(np.ravel(shapes), len(shapes[0]))
    return pa.table(columns)


def _from_table(table: pa.Table, *, pin: bool) -> list[tuple[Batch, int]]:
    """What :func:`_to_table` was given: the batches, which share one array a field, and the targets."""
    table = table.combine_chunks()
    fields: dict[str, list[torch.Tensor]] = {}
    for name in table.column_names:
        if f"{name}.shape" in table.column_names:
            values = table[name].chunk(0).flatten().to_numpy()
            # A copy in any case: Ray's memory is not to be written to.
            flat = torch.from_numpy(values.astype(np.int32 if values.dtype == np.uint16 else values.dtype))
            flat_shapes = table[f"{name}.shape"].chunk(0).flatten().to_numpy()
            shapes = flat_shapes.reshape(len(table), -1).tolist()
            parts = (flat.pin_memory() if pin else flat).split([math.prod(shape) for shape in shapes])
            fields[name] = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    fields["counted_B"] = [counted.view(torch.bool) for counted in fields["counted_B"]]
    batches = [_as_batch(dict(zip(fields, tensors, strict=True))) for tensors in zip(*fields.values(), strict=True)]
    return list(zip(batches, table["targets"].to_pylist(), strict=True))


def as_batch(arrays: dict[str, NDArray[Any]]) -> Batch:
    """A :class:`Batch` of the arrays that :meth:`arplus.data.collate.Window.batch` gives."""
    return _as_batch({name: torch.from_numpy(array) for name, array in arrays.items()})


def _as_batch(tensors: dict[str, Any]) -> Batch:
    return Batch(**{"infilled_BU": None, **tensors})
