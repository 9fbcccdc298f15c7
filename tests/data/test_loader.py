"""What the workers of a run take of an epoch does not depend on their number, and an epoch starts anywhere."""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pytest
import torch
from helpers.prepared import write_dataset
from ray import cloudpickle
from ray.data import DataContext

from arplus.config import FeedConfig, ModelConfig
from arplus.data.collate import BatchSpec
from arplus.data.dataset import RowGroup, Split
from arplus.data.loader import RankLoader, Step, read_ahead
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker, serve
from arplus.errors import UsageError
from arplus.model.batch import Batch, Packed

T = TypeVar("T")

EXAMPLES = 203
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class NotingSampler(EpochSampler):
    """Notes in a folder what is read, in whatever process that is."""

    notes: str

    def read(self, epoch: int, window: int, columns: list[str]) -> pa.Table:
        """As the sampler does."""
        table = super().read(epoch, window, columns)
        with open(f"{self.notes}/{epoch}", "a", encoding="utf-8") as file:
            file.write(f"{window}: {table.nbytes} bytes of {len(self.pieces(epoch, window))} row groups\n")
        return table


class Runs:
    """The loaders of runs with different numbers of workers and micro-batches, which share their servers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        # Two files with row groups of different sizes that are no multiples of anything.
        self.dataset = write_dataset(folder, {"train": [[50, 31, 22], [64, 36]], "valid": [[13]]})
        self.loaders: dict[tuple[int, int], list[RankLoader]] = {}

    def maker(self, workers: int, accumulation: int = 1, split: str = "train") -> WindowMaker:
        """What a run's windows are made by."""
        notes = self.notes(workers)
        notes.mkdir(exist_ok=True)
        sampler = NotingSampler(
            split=self.dataset.split(split),
            batch_size=BATCH,
            window_batches=5,
            seed=3,
            shuffled=split == "train",
            notes=str(notes),
        )
        spec = BatchSpec.of(ModelConfig(), self.dataset.sizes)
        return WindowMaker(sampler=sampler, spec=spec, workers=workers, accumulation=accumulation)

    def notes(self, workers: int) -> Path:
        """What was read for so many workers, a file for each epoch."""
        return self.folder / f"notes-{workers}"

    def of(self, workers: int, accumulation: int = 1) -> list[RankLoader]:
        """A loader for each worker."""
        key = (workers, accumulation)
        if key not in self.loaders:
            self.loaders[key] = loaders(self.maker(*key))
        return self.loaders[key]


@pytest.fixture(scope="module")
def runs(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # a task cannot import the tests
    return Runs(tmp_path_factory.mktemp("dataset"))


def loaders(maker: WindowMaker) -> list[RankLoader]:
    """A loader for each worker, as a run makes them."""
    server = serve(maker) if maker.workers > 1 else None
    return [RankLoader(maker, rank, server) for rank in range(maker.workers)]


def on_all(ranks: list[RankLoader], work: Callable[[RankLoader], T]) -> list[T]:
    """What each rank gives, in a thread of its own."""
    with ThreadPoolExecutor(len(ranks)) as threads:
        return list(threads.map(work, ranks))


def epoch_of(ranks: list[RankLoader], epoch: int, first: int = 0, last: int | None = None) -> list[list[Step]]:
    """The steps of each rank."""
    return on_all(ranks, lambda rank: list(rank.batches(epoch, first, last)))


def global_batches(by_rank: list[list[Step]]) -> list[list[int]]:
    """The example ids of every global batch, put together from the workers' parts."""
    return [
        sorted(i for step in steps for batch in step.micro_batches for i in batch.example_id_B.tolist())
        for steps in zip(*by_rank, strict=True)
    ]


def contents(value: Any) -> Any:
    """Batches as plain values, blocks included."""
    if isinstance(value, torch.Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [contents(item) for item in value]
    if hasattr(value, "__dict__"):
        return {name: contents(item) for name, item in vars(value).items()}
    return value


def examples(batch: Batch) -> dict[int, tuple[list[int], ...]]:
    """By id what a batch holds of each example, whatever is beside it; profiles apart."""

    def lists(packed: Packed) -> list[list[int]]:
        return [ids.tolist() for ids in packed.ids.split(packed.sequences.lengths.tolist())]

    assert batch.infilled is not None
    fields = map(lists, (batch.context, batch.persona, batch.response, batch.infilled))
    return dict(zip(batch.example_id_B.tolist(), zip(*fields, strict=True), strict=True))


def test_an_epoch_is_every_example_once_whatever_the_workers(runs: Runs) -> None:
    alone = epoch_of(runs.of(1), 2)
    batches = global_batches(alone)
    assert sorted(i for batch in batches for i in batch) == list(range(EXAMPLES))
    assert [len(batch) for batch in batches] == [BATCH] * (EXAMPLES // BATCH) + [EXAMPLES % BATCH]
    found = {i: facts for step in alone[0] for i, facts in examples(step.micro_batches[0]).items()}
    for workers, accumulation in ((1, 4), (2, 1), (2, 3), (4, 1)):
        by_rank = epoch_of(runs.of(workers, accumulation), 2)
        assert global_batches(by_rank) == batches
        for steps in by_rank:
            assert [step.targets for step in steps] == [step.targets for step in alone[0]]
            for step in steps:
                assert len(step.micro_batches) == accumulation
                for batch in step.micro_batches:
                    assert all(found[i] == facts for i, facts in examples(batch).items())


def test_every_step_counts_what_is_in_the_global_batch(runs: Runs) -> None:
    for steps in zip(*epoch_of(runs.of(2, 3), 0), strict=True):
        targets = sum(len(batch.target_N) for step in steps for batch in step.micro_batches)
        assert {step.targets for step in steps} == {targets}
        ids = [i for step in steps for batch in step.micro_batches for i in batch.example_id_B]
        assert {step.examples for step in steps} == {len(ids)}


def test_micro_batches_of_a_step_differ_by_one_example_and_the_last_may_be_empty(runs: Runs) -> None:
    by_rank = epoch_of(runs.of(2, 3), 0, 20)
    together = zip(*by_rank, strict=True)
    sizes = [[len(b.context.sequences) for step in steps for b in step.micro_batches] for steps in together]
    assert sizes == [[2, 2, 1, 1, 1, 1]] * 5 + [[1, 1, 1, 0, 0, 0]]
    empty = by_rank[1][-1]
    assert [len(batch.profiles.sequences) for batch in empty.micro_batches] == [0, 0, 0]
    assert empty.targets == by_rank[0][-1].targets > 0


@pytest.mark.parametrize("workers", [1, 2])
def test_an_epoch_goes_on_from_any_step(runs: Runs, workers: int) -> None:
    whole = contents(epoch_of(runs.of(workers), 1))
    steps = len(whole[0])
    for first, last in ((1, None), (5, 6), (12, 14), (steps - 1, None), (3, 11)):
        assert contents(epoch_of(runs.of(workers), 1, first, last)) == [steps[first:last] for steps in whole]


def test_infilling_changes_with_the_epoch_in_training_alone(runs: Runs) -> None:
    def infilled(split: str, epoch: int) -> dict[int, list[int]]:
        (steps,) = epoch_of(loaders(runs.maker(1, split=split)), epoch)
        return {i: facts[-1] for step in steps for b in step.micro_batches for i, facts in examples(b).items()}

    first, second = infilled("train", 0), infilled("train", 1)
    assert sum(first[i] != second[i] for i in first) > EXAMPLES / 4
    assert infilled("valid", 0) == infilled("valid", 1)


def test_a_block_that_ray_data_cuts_between_workers_changes_nothing(
    runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    maker = runs.maker(3, 2)
    whole = list(map(bytes, chain.from_iterable(maker.parts(0, range(3)))))
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 3000)
    assert list(map(bytes, chain.from_iterable(maker.parts(0, range(3))))) == whole


def test_a_window_of_large_batches_is_still_small_enough_to_read() -> None:
    feed = FeedConfig()
    assert [feed.batches_of_window(size) for size in (64, 1024, 8192, 65_536, 1 << 20)] == [256, 256, 32, 4, 1]
    assert FeedConfig(shuffle_window_batches=8).batches_of_window(64) == 8


# ------------------------------------------------------------------------------------------- one server, many workers


def test_every_window_is_read_once_whatever_the_workers(runs: Runs) -> None:
    reads = {}
    for workers in (1, 2, 4):
        epoch_of(runs.of(workers), 5)
        reads[workers] = sorted((runs.notes(workers) / "5").read_text().splitlines())
    assert [read.split(":")[0] for read in reads[1]] == ["0", "1", "2", "3", "4", "5"]
    assert reads[2] == reads[1]
    assert reads[4] == reads[1]


def test_a_worker_may_be_ahead_of_another(runs: Runs) -> None:
    by_rank = [[list(rank.batches(epoch)) for epoch in (2, 3)] for rank in runs.of(2)]
    for i, epoch in enumerate((2, 3)):
        assert global_batches([steps[i] for steps in by_rank]) == global_batches(epoch_of(runs.of(1), epoch))


def test_workers_that_leave_an_epoch_early_find_the_next_one_whole(runs: Runs) -> None:
    found: list[list[list[Step]]] = []
    for rank in runs.of(2):  # one after the other: the second asks for what the first has left
        with closing(rank.batches(2)) as steps:
            begun = [next(steps) for _ in range(3)]
        found.append([begun, list(rank.batches(3))])
    assert global_batches([steps[0] for steps in found]) == global_batches(epoch_of(runs.of(1), 2, 0, 3))
    assert global_batches([steps[1] for steps in found]) == global_batches(epoch_of(runs.of(1), 3))
    assert none_after_a_while() == []


@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_window_reaches_the_training_step_of_every_worker(runs: Runs, workers: int) -> None:
    maker = runs.maker(workers)
    lost = Split("train", EXAMPLES, 1, (RowGroup("/nowhere/missing.parquet", 0, EXAMPLES),))
    maker = replace(maker, sampler=replace(maker.sampler, split=lost))

    def error(rank: RankLoader) -> str:
        with pytest.raises(UsageError) as caught:
            next(rank.batches(0))
        return str(caught.value)

    assert on_all(loaders(maker), error) == ["/nowhere/missing.parquet: no such file"] * workers
    assert none_after_a_while() == []


# ------------------------------------------------------------------------------------------------------- read ahead


def feed_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("feed", "StreamingExecutor", "iter_threaded"))]


def none_after_a_while() -> list[str]:
    """Ray Data's own threads end a moment after their executor."""
    deadline = time.monotonic() + 20
    while feed_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    return feed_threads()


def test_leaving_an_epoch_early_leaves_nothing_running(runs: Runs) -> None:
    (rank,) = runs.of(1)
    steps = rank.batches(0)
    next(steps)
    assert feed_threads()
    steps.close()
    assert none_after_a_while() == []


def test_an_error_in_the_loop_around_leaves_nothing_running(runs: Runs) -> None:
    (rank,) = runs.of(1)

    def train() -> None:
        for step in rank.batches(0):
            raise RuntimeError(f"loss of {step.targets} targets is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert none_after_a_while() == []


def test_one_item_is_made_while_the_last_one_is_used() -> None:
    made = threading.Semaphore(0)

    def make(i: int) -> int:
        made.release()
        return i * i

    numbers = read_ahead((i for i in range(4)), make)
    assert next(numbers) == 0
    assert made.acquire(timeout=5)
    assert made.acquire(timeout=5)  # the second, without being asked for
    assert not made.acquire(timeout=0.1)
    assert list(numbers) == [1, 4, 9]
    assert feed_threads() == []


def test_the_items_are_closed_when_the_reader_stops_or_the_making_fails() -> None:
    closed: list[bool] = []

    def items() -> Iterator[int]:
        try:
            yield from range(10)
        finally:
            closed.append(True)

    def generator() -> Generator[int, None, None]:
        yield from items()

    stopped = read_ahead(generator(), str)
    assert next(stopped) == "0"
    stopped.close()
    assert closed == [True]
    with pytest.raises(ZeroDivisionError):
        list(read_ahead(generator(), lambda i: 1 // (2 - i)))
    assert closed == [True, True]
    assert feed_threads() == []
