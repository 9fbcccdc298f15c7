"""What the workers of a run take of an epoch does not depend on their number, and an epoch starts anywhere."""

import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from prepared import write_dataset
from ray.data import DataContext

from arplus.config import FeedConfig, ModelConfig
from arplus.data.collate import BatchSpec
from arplus.data.dataset import Dataset, RowGroup, Split
from arplus.data.loader import RankLoader, Step, WindowMaker, read_ahead, serve
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


def make(dataset: Dataset, *, split: str = "train", window_batches: int = 5, **counts: int) -> WindowMaker:
    sampler = EpochSampler(
        split=dataset.split(split),
        batch_size=BATCH,
        window_batches=window_batches,
        seed=3,
        shuffled=split == "train",
    )
    return WindowMaker(sampler=sampler, spec=BatchSpec.of(ModelConfig(), dataset.sizes), **counts)


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
    for counts in ({"workers": 2}, {"accumulation": 4}, {"workers": 3}, {"workers": 4, "accumulation": 2}):
        by_rank = epoch_of(loaders(make(dataset, **counts)), 2)
        assert global_batches(by_rank) == batches, counts
        assert {step.targets for step in by_rank[0]} == {step.targets for step in by_rank[-1]}
        for steps in by_rank:
            assert {len(step.micro_batches) for step in steps} == {counts.get("accumulation", 1)}
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
    sizes = [[len(b.context.sequences) for step in steps for b in step.micro_batches] for steps in zip(*by_rank, strict=True)]
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
    for first, last in ((1, None), (5, None), (12, 14), (steps - 1, None), (3, 11), (4, 4)):
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

    def error(rank: RankLoader) -> Exception:
        with pytest.raises(UserError, match=r"/nowhere/missing\.parquet: no such file") as caught:
            next(rank.batches(0))
        return caught.value

    errors = on_all(loaders(maker), error)
    for e in errors:
        print(type(e), type(e).__mro__, str(e))
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
