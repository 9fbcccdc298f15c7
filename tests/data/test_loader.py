"""What the workers of a run take of an epoch does not depend on their number, and an epoch starts anywhere."""

import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import pyarrow as pa
import pytest
import ray
import torch
from prepared import write_dataset
from ray import cloudpickle
from ray.data import DataContext

from arplus.config import FeedConfig, ModelConfig
from arplus.data import loader
from arplus.data.collate import BatchSpec
from arplus.data.dataset import Dataset, RowGroup, Split
from arplus.data.loader import RankLoader, Step, WindowMaker, WindowServer, read_ahead, serve
from arplus.data.packing import unpack
from arplus.data.sampler import EpochSampler
from arplus.errors import UserError
from arplus.model.batch import Batch, Packed

T = TypeVar("T")

EXAMPLES = 203
BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two files with row groups of different sizes that are no multiples of anything."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder, {"train": [[50, 31, 22], [64, 36]], "valid": [[13]]})


def make(
    dataset: Dataset, *, split: str = "train", window_batches: int = 5, workers: int = 1, accumulation: int = 1
) -> WindowMaker:
    sampler = EpochSampler(
        split=dataset.split(split),
        batch_size=BATCH,
        window_batches=window_batches,
        seed=3,
        shuffled=split == "train",
    )
    return WindowMaker(
        sampler=sampler, spec=BatchSpec.of(ModelConfig(), dataset.sizes), workers=workers, accumulation=accumulation
    )


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


def contents(batch: Any) -> Any:
    """A batch as plain values, blocks included."""
    if isinstance(batch, torch.Tensor):
        return batch.tolist()
    if hasattr(batch, "__dict__"):
        return {name: contents(value) for name, value in vars(batch).items()}
    return [contents(value) for value in batch] if isinstance(batch, tuple) else batch


def examples(batch: Batch) -> dict[int, tuple[list[int], ...]]:
    """By id what a batch holds of each example, whatever is beside it; profiles apart."""

    def lists(packed: Packed) -> list[list[int]]:
        return [ids.tolist() for ids in packed.ids.split(packed.sequences.lengths.tolist())]

    assert batch.infilled is not None
    fields = map(lists, (batch.context, batch.persona, batch.response, batch.infilled))
    return dict(zip(batch.example_id_B.tolist(), zip(*fields, strict=True), strict=True))


@pytest.mark.usefixtures("ray_cluster")
def test_an_epoch_is_every_example_once_whatever_the_workers(dataset: Dataset) -> None:
    alone = epoch_of(loaders(make(dataset)), 2)
    batches = global_batches(alone)
    assert sorted(i for batch in batches for i in batch) == list(range(EXAMPLES))
    assert [len(batch) for batch in batches] == [BATCH] * (EXAMPLES // BATCH) + [EXAMPLES % BATCH]
    found = {i: facts for step in alone[0] for i, facts in examples(step.micro_batches[0]).items()}
    for workers, accumulation in ((2, 1), (1, 4), (3, 1), (4, 2)):
        by_rank = epoch_of(loaders(make(dataset, workers=workers, accumulation=accumulation)), 2)
        assert global_batches(by_rank) == batches
        assert {step.targets for step in by_rank[0]} == {step.targets for step in by_rank[-1]}
        for steps in by_rank:
            assert {len(step.micro_batches) for step in steps} == {accumulation}
            for step in steps:
                for batch in step.micro_batches:
                    assert all(found[i] == facts for i, facts in examples(batch).items())


@pytest.mark.usefixtures("ray_cluster")
def test_every_step_counts_the_targets_of_the_global_batch(dataset: Dataset) -> None:
    for steps in zip(*epoch_of(loaders(make(dataset, workers=2, accumulation=2)), 0), strict=True):
        targets = sum(len(batch.target_N) for step in steps for batch in step.micro_batches)
        assert {step.targets for step in steps} == {targets}


@pytest.mark.usefixtures("ray_cluster")
def test_micro_batches_of_a_step_differ_by_one_example_and_the_last_may_be_empty(dataset: Dataset) -> None:
    by_rank = epoch_of(loaders(make(dataset, workers=2, accumulation=3)), 0)
    sizes = [
        [len(b.context.sequences) for step in steps for b in step.micro_batches] for steps in zip(*by_rank, strict=True)
    ]
    assert sizes[:-1] == [[2, 2, 1, 1, 1, 1]] * (len(sizes) - 1)
    assert sizes[-1] == [1, 1, 1, 0, 0, 0]
    empty = by_rank[1][-1].micro_batches
    assert [len(batch.profiles.sequences) for batch in empty] == [0, 0, 0]
    assert by_rank[1][-1].targets == by_rank[0][-1].targets > 0


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_epoch_goes_on_from_any_step(dataset: Dataset, workers: int) -> None:
    ranks = loaders(make(dataset, workers=workers))
    whole = [[contents(step) for step in steps] for steps in epoch_of(ranks, 1)]
    steps = len(whole[0])
    for first, last in ((1, None), (5, None), (12, 14), (steps - 1, None), (3, 11)):
        found = epoch_of(ranks, 1, first, last)
        assert [[contents(step) for step in steps] for steps in found] == [steps[first:last] for steps in whole]


@pytest.mark.usefixtures("ray_cluster")
def test_infilling_changes_with_the_epoch_in_training_alone(dataset: Dataset) -> None:
    def infilled(split: str, epoch: int) -> dict[int, list[int]]:
        (steps,) = epoch_of(loaders(make(dataset, split=split)), epoch)
        return {i: facts[-1] for step in steps for b in step.micro_batches for i, facts in examples(b).items()}

    first, second = infilled("train", 0), infilled("train", 1)
    assert sum(first[i] != second[i] for i in first) > EXAMPLES / 4
    assert infilled("valid", 0) == infilled("valid", 1)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 3])
def test_a_block_that_ray_data_cuts_between_workers_changes_nothing(
    dataset: Dataset, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = loaders(make(dataset, workers=workers, accumulation=2))
    whole = contents(tuple(map(tuple, epoch_of(ranks, 0, 7, 19))))
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 3000)
    ranks = loaders(make(dataset, workers=workers, accumulation=2))
    assert contents(tuple(map(tuple, epoch_of(ranks, 0, 7, 19)))) == whole


# ------------------------------------------------------------------------------------------- one server, many workers


@dataclass(frozen=True, kw_only=True)
class NotedSampler(EpochSampler):
    """Notes in a file what it reads, in whatever process that is."""

    notes: str

    def read(self, epoch: int, window: int, columns: list[str]) -> pa.Table:
        table = super().read(epoch, window, columns)
        groups = len(self.pieces(epoch, window))
        with open(self.notes, "a", encoding="utf-8") as file:
            file.write(f"{epoch} {window} {groups} {table.nbytes}\n")
        return table


def noted(maker: WindowMaker, notes: Path) -> WindowMaker:
    """A maker whose sampler notes what is read."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # tests are no module that a task can import
    facts = {f.name: getattr(maker.sampler, f.name) for f in fields(EpochSampler)}
    return replace(maker, sampler=NotedSampler(**facts, notes=str(notes)))


@pytest.mark.usefixtures("ray_cluster")
def test_every_window_is_read_once_whatever_the_workers(dataset: Dataset, tmp_path: Path) -> None:
    reads = {}
    for workers in (1, 2, 4):
        notes = tmp_path / f"{workers}"
        ranks = loaders(noted(make(dataset, workers=workers), notes))
        assert len(epoch_of(ranks, 0)) == workers
        reads[workers] = sorted(map(tuple, (line.split() for line in notes.read_text().splitlines())))
    assert [read[1] for read in reads[1]] == [str(window) for window in range(make(dataset).sampler.windows)]
    assert reads[2] == reads[1]
    assert reads[4] == reads[1]


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_may_be_ahead_of_another(dataset: Dataset) -> None:
    whole = [contents(step.micro_batches[0].example_id_B) for step in epoch_of(loaders(make(dataset)), 0)[0]]
    ranks = loaders(make(dataset, workers=2))
    by_rank = [[list(rank.batches(epoch)) for epoch in (0, 1)] for rank in ranks]
    assert global_batches([steps[0] for steps in by_rank]) == [sorted(ids) for ids in whole]
    found = [i for batch in global_batches([steps[1] for steps in by_rank]) for i in batch]
    assert sorted(found) == list(range(EXAMPLES))


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_leave_an_epoch_early_find_the_next_one_whole(dataset: Dataset) -> None:
    ranks = loaders(make(dataset, workers=2, window_batches=1))
    found: list[list[list[Step]]] = []
    for rank in ranks:  # one after the other: the second asks for windows that the first has left
        with closing(rank.batches(0)) as steps:
            begun = [next(steps), next(steps), next(steps)]
        found.append([begun, list(rank.batches(1))])
    single = loaders(make(dataset, window_batches=1))
    assert global_batches([steps[0] for steps in found]) == global_batches(epoch_of(single, 0, 0, 3))
    assert global_batches([steps[1] for steps in found]) == global_batches(epoch_of(single, 1))
    assert none_after_a_while() == []


@pytest.mark.usefixtures("ray_cluster")
def test_a_server_keeps_what_is_not_fetched_until_its_worker_leaves() -> None:
    ended: list[int] = []

    class Maker:
        """Parts that name their epoch, window and worker."""

        workers = 2

        def parts(self, epoch: int, windows: range) -> Generator[list[str], None, None]:
            try:
                for window in windows:
                    yield [f"{epoch} {window} {rank}" for rank in range(2)]
            finally:
                ended.append(epoch)

    server = WindowServer(cast(WindowMaker, Maker()))

    def part(number: int, window: int, rank: int) -> str:
        (reference,) = server.part(number, 10 + number, range(5, 9), window, rank)
        return str(ray.get(reference))

    assert [part(0, 5, 0), part(0, 6, 0), part(0, 5, 1)] == ["10 5 0", "10 6 0", "10 5 1"]
    assert list(map(len, server.kept)) == [0, 1]
    server.leave(0, 0)
    assert (ended, part(0, 6, 1), part(0, 7, 1)) == ([], "10 6 1", "10 7 1")
    server.leave(0, 1)
    assert (ended, part(1, 5, 1)) == ([10], "11 5 1")
    assert part(2, 5, 0) == "12 5 0", "the first worker left before the second pass and missed it"
    assert ended == [10, 11]
    with pytest.raises(RuntimeError, match="pass 1 ended for other workers before its window 6 was made"):
        part(1, 6, 1)
    server.leave(1, 1)
    assert (part(2, 5, 1), list(map(len, server.kept))) == ("12 5 1", [0, 0])


def test_a_large_part_becomes_tensors_in_chunks(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = make(dataset, workers=2, accumulation=2)
    ((whole,), _) = maker.make(0, 1)
    monkeypatch.setattr(loader, "CHUNK_EXAMPLES", 10)  # of a worker: two steps of four each
    chunks, _ = maker.make(0, 1)
    assert [len(chunk.targets) for chunk in chunks] == [2, 2, 1]
    assert [t for chunk in chunks for t in chunk.targets.tolist()] == whole.targets.tolist()
    found = [contents(batch) for chunk in chunks for batch in unpack(chunk.micro_batches)]
    assert found == [contents(batch) for batch in unpack(whole.micro_batches)]


def test_a_window_of_large_batches_is_still_small_enough_to_read() -> None:
    feed = FeedConfig()
    assert [feed.batches_of_window(size) for size in (64, 1024, 8192, 65_536, 1 << 20)] == [256, 256, 32, 4, 1]
    assert FeedConfig(window_batches=8).batches_of_window(64) == 8


# ------------------------------------------------------------------------------------------------------- read ahead


def feed_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("feed", "StreamingExecutor", "iter_threaded"))]


def none_after_a_while() -> list[str]:
    """Ray Data's own threads end a moment after their executor."""
    deadline = time.monotonic() + 20
    while feed_threads() and time.monotonic() < deadline:
        time.sleep(0.05)
    return feed_threads()


@pytest.mark.usefixtures("ray_cluster")
def test_leaving_an_epoch_early_leaves_nothing_running(dataset: Dataset) -> None:
    (rank,) = loaders(make(dataset, window_batches=1))
    steps = rank.batches(0)
    next(steps)
    assert feed_threads()
    steps.close()
    assert none_after_a_while() == []


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_in_the_loop_around_leaves_nothing_running(dataset: Dataset) -> None:
    (rank,) = loaders(make(dataset, window_batches=1))

    def train() -> None:
        for step in rank.batches(0):
            raise RuntimeError(f"loss of {step.targets} targets is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert none_after_a_while() == []


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_in_a_window_reaches_the_training_step_of_every_worker(dataset: Dataset, workers: int) -> None:
    maker = make(dataset, workers=workers)
    lost = Split("train", EXAMPLES, 1, (RowGroup("/nowhere/missing.parquet", 0, EXAMPLES),))
    maker = replace(maker, sampler=replace(maker.sampler, split=lost))

    def error(rank: RankLoader) -> str:
        with pytest.raises(UserError) as caught:
            next(rank.batches(0))
        return str(caught.value)

    assert on_all(loaders(maker), error) == ["/nowhere/missing.parquet: no such file"] * workers
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
