"""The windows of an epoch, each made once for all workers by a Ray Data task, and handed out in parts.

A task reads a window (:mod:`arplus.data.sampler` says what it holds), makes the micro-batches of all workers from it,
and packs a part for each worker. So what is read and computed does not grow with the number of workers. Nothing here
imports torch, which would cost a task's process two seconds and 190 MB.

Where there are several workers, a :class:`WindowServer`, an actor beside rank 0, iterates the windows and hands them
out. A worker's part goes from object store to object store; the server's reply is the reference alone. Ray Data's
``streaming_split`` does not do here. Which block goes to which worker it decides by the rows that each has had, without
a promise ("OutputSplitter does not provide any ordering guarantees"), and it drops rows where parts are to be equal
(ray#63285). It splits one data set from its beginning, whereas every epoch, and every start in one, is another one, and
at each start its workers wait for each other by polling.
"""

import functools
import pickle
from collections import deque
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, cast

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arplus.cluster import connection
from arplus.config import FeedConfig
from arplus.data.collate import BatchSpec, ExampleRng, MicroBatches, Window
from arplus.data.sampler import EpochSampler, deal
from arplus.errors import ArplusError

TASK_CPUS = 1
"""Logical CPUs of one window task. With half of one there were more tasks at once than Ray keeps idle processes (one a
CPU), so that it ended and started them all the time: 45 k examples/s instead of 115 k on the same busy machine."""

CHUNK_EXAMPLES = 16_384
"""Examples that a worker makes tensors of at a time: 50 MB."""


class Chunk(NamedTuple):
    """Consecutive steps of one worker."""

    targets: NDArray[np.integer]
    """Targets of each global batch."""
    examples: NDArray[np.integer]
    """Examples of each global batch."""
    micro_batches: MicroBatches
    """In order: ``accumulation`` of each step."""


@dataclass(frozen=True, kw_only=True)
class WindowMaker:
    """Makes the windows of a split, each once for all workers."""

    sampler: EpochSampler
    spec: BatchSpec
    workers: int = 1
    accumulation: int = 1
    """Micro-batches per worker and step."""
    prefetch: int = FeedConfig.prefetch
    """Windows fetched ahead, of those that are made."""

    def make(self, epoch: int, index: int) -> list[list[Chunk]]:
        """A window, a part for each worker."""
        sampler = self.sampler
        window = Window(sampler.read(epoch, index, self.spec.columns), self.spec)
        rows = sampler.order(epoch, index, window.context.lengths)
        firsts_S = np.arange(0, len(rows), sampler.batch_size)
        targets_S, examples_S = np.add.reduceat(window.targets[rows], firsts_S), np.diff(firsts_S, append=len(rows))
        dealt, sizes_WSA = deal(rows, sampler.batch_size, self.workers, self.accumulation)
        rng = ExampleRng(sampler.seed, epoch if sampler.shuffled else 0)
        steps = max(CHUNK_EXAMPLES * self.workers // sampler.batch_size, 1)
        parts: list[list[Chunk]] = []
        begin = 0
        for sizes_SA in sizes_WSA:
            parts.append([])
            for s in range(0, len(targets_S), steps):
                examples = sizes_SA[s : s + steps].ravel()
                end = begin + int(examples.sum())
                micro_batches = window.micro_batches(dealt[begin:end], examples, rng)
                counts = targets_S[s : s + steps], examples_S[s : s + steps]
                parts[-1].append(Chunk(*counts, micro_batches.narrowed()))
                begin = end
        return parts

    def parts(self, epoch: int, windows: range) -> Generator[list[pa.Buffer], None, None]:
        """The parts of each of these windows, made by Ray Data ahead of time; :func:`unpickle` reads them."""
        # A block of ``range`` is one row here, so one window is one task.
        dataset = ray.data.range(len(windows), override_num_blocks=len(windows)).map_batches(
            functools.partial(_task, self, epoch, windows.start), batch_size=None, num_cpus=TASK_CPUS
        )
        connection.quiet()  # Ray Data's import, just now in a server of windows, has set its loggers anew
        context = dataset.context
        context.enable_progress_bars = False
        context.execution_options.preserve_order = True  # ray#35053
        # No resource limit: kept back by one, Ray Data's executor polls without a pause in the process that trains, and
        # a step of arplus --tiny took 350 ms instead of 100. It makes windows until its share of the store is full.
        tables = dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=self.prefetch)
        with closing(cast(Generator[pa.Table, None, None], iter(tables))) as found:
            # Ray Data cuts a large window's table in two.
            parts: list[pa.Buffer] = []
            for table in found:
                for part in chain.from_iterable(table["part"].chunks):
                    parts.append(part.as_buffer())
                    if len(parts) == self.workers:
                        yield parts
                        parts = []


def _task(maker: WindowMaker, epoch: int, first_window: int, item: Any) -> pa.Table:
    (index,) = item["id"]
    parts: Sequence[list[Chunk] | ArplusError]
    try:
        parts = maker.make(epoch, first_window + int(index))
    except ArplusError as error:  # Ray Data would keep of it the text of a traceback
        parts = [error] * maker.workers
    return pa.table({"part": [pickle.dumps(part, protocol=5) for part in parts]})


def unpickle(part: pa.Buffer) -> list[Chunk]:
    """A worker's part of a window. Raises what went wrong where its data could not be read."""
    found: list[Chunk] | ArplusError = pickle.loads(part)
    if isinstance(found, ArplusError):
        raise found
    return found


class WindowServer:
    """Makes each window once and hands every worker its part: an actor, started by :func:`serve`.

    All workers call :meth:`RankLoader.batches` in the same sequence; each call is a pass here. A worker may be a little
    ahead of another. A window is fetched when the first worker asks for it; the other parts are kept until they are
    fetched, or until their worker leaves the pass.
    """

    def __init__(self, maker: WindowMaker) -> None:
        self.maker = maker
        self.number = -1
        """The newest pass; the following is about this one."""
        self.made: Generator[list[pa.Buffer], None, None] | None = None
        self.next_window = 0
        self.error: Exception | None = None
        self.left: set[int] = set()
        self.kept: list[deque[tuple[tuple[int, int], ray.ObjectRef]]] = [deque() for _ in range(maker.workers)]
        """For each worker the parts that it has not fetched, each with its pass and window."""

    def part(self, number: int, epoch: int, windows: range, window: int, rank: int) -> list[ray.ObjectRef]:
        """A worker's part of a window of a pass: a reference in a list, since Ray would send the object otherwise."""
        if number > self.number:
            self._end()
            self.number, self.next_window, self.error, self.left = number, windows.start, None, set()
            self.made = self.maker.parts(epoch, windows)
        kept, place = self.kept[rank], (number, window)
        while kept and kept[0][0] < place:
            kept.popleft()
        while not kept and number == self.number:
            self._make()
        if not kept or kept[0][0] != place:
            raise RuntimeError(f"pass {number} ended for other workers before its window {window} was made")
        return [kept.popleft()[1]]

    def leave(self, number: int, rank: int) -> None:
        """Called when a worker wants no more of a pass."""
        kept = self.kept[rank]
        while kept and kept[0][0][0] <= number:
            kept.popleft()
        if number == self.number:
            self.left.add(rank)
            if len(self.left) == self.maker.workers:
                self._end()

    def _make(self) -> None:
        """Has the pass's next window made. What went wrong with it every worker is told."""
        assert self.made is not None
        if self.error is None:
            try:
                for kept, part in zip(self.kept, next(self.made), strict=True):
                    kept.append(((self.number, self.next_window), ray.put(part)))
                self.next_window += 1
            except Exception as error:
                self.error = error
        if self.error is not None:
            raise self.error

    def _end(self) -> None:
        if self.made is not None:
            self.made.close()
            self.made = None


def serve(maker: WindowMaker) -> ActorHandle:
    """A :class:`WindowServer` on this node, for the loaders of all workers. It ends with this process, its owner."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor: Any = ray.remote(WindowServer)
    return cast(ActorHandle, actor.options(num_cpus=0, scheduling_strategy=here).remote(maker))
