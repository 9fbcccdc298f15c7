"""One worker's batches of a split, made ready ahead of the training step.

Ray Data makes the windows (:mod:`arplus.data.windows`); here a worker's parts of them become tensors, in pinned memory
where there is a GPU, in a thread that is ahead of the training step. An epoch starts anywhere: at step ``s`` with
window ``s // window_batches``.
"""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import chain, islice
from typing import NamedTuple, TypeVar

import pyarrow as pa
import ray
import torch
from ray.actor import ActorHandle

from arplus.data.capacity import Filler
from arplus.data.packing import unpack
from arplus.data.sampler import EpochSampler
from arplus.data.windows import Chunk, WindowMaker, unpickle
from arplus.model.batch import Batch

S = TypeVar("S")
T = TypeVar("T")


class Step(NamedTuple):
    """One worker's part of an optimizer step."""

    micro_batches: list[Batch]
    """This worker's micro-batches, on the CPU. In an epoch's last step some may have no example."""
    targets: int
    """Targets ([EOS] included) of the whole global batch: the count that every worker divides its loss by."""
    examples: int = 0
    """Examples of the whole global batch, by which L_W is divided."""


class RankLoader:
    """The batches of one worker. Iterating needs a running Ray; see the module's docstring for how they come about."""

    def __init__(
        self, maker: WindowMaker, rank: int = 0, server: ActorHandle | None = None, filler: Filler | None = None
    ) -> None:
        assert server is not None or maker.workers == 1, "several workers share a server of their windows"
        self.maker = maker
        self.rank = rank
        self.server = server
        self.filler = filler
        """Gives the micro-batches one shape, for a device that wants that."""
        self.passes = 0

    @property
    def sampler(self) -> EpochSampler:
        """The order of the split."""
        return self.maker.sampler

    @property
    def steps(self) -> int:
        """Optimizer steps per epoch, the same for every worker."""
        return self.sampler.steps

    def batches(self, epoch: int, first: int = 0, last: int | None = None) -> Generator[Step, None, None]:
        """The steps ``first`` to ``last - 1`` of an epoch; to its end by default.

        All workers call this with the same arguments in the same sequence, and leave an iterator at the same step.
        Windows become tensors in the background. Whoever leaves the iterator early closes it (an error in a for loop
        around it does), and with it the thread and Ray Data's executor.
        """
        last = self.steps if last is None else last
        first_window, skip = divmod(first, self.sampler.window_batches)
        windows = range(first_window, -(-last // self.sampler.window_batches))
        with closing(read_ahead(self._chunks(epoch, windows), self._steps)) as chunks:
            yield from islice(chain.from_iterable(chunks), skip, skip + last - first)

    def _chunks(self, epoch: int, windows: range) -> Generator[Chunk, None, None]:
        with closing(self._parts(epoch, windows)) as parts:
            for part in parts:
                yield from unpickle(part)

    def _parts(self, epoch: int, windows: range) -> Generator[pa.Buffer, None, None]:
        if self.server is None:
            with closing(self.maker.parts(epoch, windows)) as made:
                for (part,) in made:
                    yield part
            return
        number = self.passes
        self.passes += 1
        try:
            for window in windows:
                (part,) = ray.get(self.server.part.remote(number, epoch, windows, window, self.rank))
                yield ray.get(part)
        finally:
            self.server.leave.remote(number, self.rank)

    def _steps(self, chunk: Chunk) -> Iterator[Step]:
        pin = torch.cuda.is_available()
        if self.filler is None:
            batches = unpack(chunk.micro_batches, pin=pin)
        else:
            batches = iter(self.filler(list(unpack(chunk.micro_batches)), pin=pin))
        counts = zip(chunk.targets.tolist(), chunk.examples.tolist(), strict=True)
        return (Step(list(islice(batches, self.maker.accumulation)), *count) for count in counts)


def read_ahead(items: Generator[S, None, None], make: Callable[[S], T]) -> Generator[T, None, None]:
    """``make(item)`` of every item, made by a thread that is one ahead; its errors are raised here.

    Many steps at a time: a hand-over for each one would cost 0.1 ms.
    """

    def following() -> T | None:
        item = next(items, None)
        return None if item is None else make(item)

    with closing(items), ThreadPoolExecutor(1, thread_name_prefix="feed") as thread:
        made = thread.submit(following)
        while (result := made.result()) is not None:
            made = thread.submit(following)
            yield result
