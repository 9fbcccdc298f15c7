"""The feed's order does not depend on who reads it, and an epoch starts anywhere."""

import threading
import time
from collections.abc import Generator, Iterator
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from prepared import random_examples, write_dataset
from ray.data import DataContext

from arplus.config import AR, FeedConfig, ModelConfig, special_ids
from arplus.data.collate import EXACT, Draws, Layout, Widths, Window
from arplus.data.dataset import Dataset, RowGroup, Split
from arplus.data.feed import Feed, Order, Place, Step, _from_table, _to_table, prepare_window, read_ahead
from arplus.model.batch import Batch

EXAMPLES = 203
BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Two files with row groups of different sizes that are no multiples of anything."""
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder, {"train": [[50, 31, 22], [64, 36]], "valid": [[13]]})


def make_feed(dataset: Dataset, *, seed: int = 3, shuffled: bool = True, window_batches: int = 5, **place: int) -> Feed:
    order = Order(
        split=dataset.split("train"),
        batch_size=BATCH,
        window_batches=window_batches,
        seed=seed,
        shuffled=shuffled,
    )
    return Feed(order, Layout.of(ModelConfig(), dataset.sizes), Place(**place), FeedConfig())


def counted(step: Step) -> list[list[int]]:
    return [b.example_id_B[b.counted_B].tolist() for b in step.micro_batches]


def global_batches(feeds: list[Feed], epoch: int, first: int = 0, last: int | None = None) -> list[list[int]]:
    """The example ids of every global batch, put together from the workers' parts."""
    batches = []
    for steps in zip(*(feed.batches(epoch, first, last) for feed in feeds), strict=True):
        batches.append(sorted(i for step in steps for part in counted(step) for i in part))
    return batches


def workers(dataset: Dataset, n: int, accumulation: int = 1) -> list[Feed]:
    return [make_feed(dataset, rank=r, workers=n, accumulation=accumulation) for r in range(n)]


@pytest.mark.usefixtures("ray_cluster")
def test_an_epoch_is_every_example_once_whatever_the_workers(dataset: Dataset) -> None:
    alone = global_batches(workers(dataset, 1), epoch=2)
    assert sorted(i for batch in alone for i in batch) == sorted(range(EXAMPLES))
    assert len(alone) == -(-EXAMPLES // BATCH)
    assert sorted(map(len, alone)) == [EXAMPLES % BATCH] + [BATCH] * (EXAMPLES // BATCH)
    assert global_batches(workers(dataset, 2), epoch=2) == alone
    assert global_batches(workers(dataset, 1, accumulation=4), epoch=2) == alone
    assert BATCH % 3, "three workers need rows that fill up and do not count"
    assert global_batches(workers(dataset, 3), epoch=2) == alone


@pytest.mark.usefixtures("ray_cluster")
def test_an_epoch_goes_on_from_any_step_with_any_workers(dataset: Dataset) -> None:
    whole = global_batches(workers(dataset, 1), epoch=1)
    for first in (1, 5, 12, len(whole) - 1):
        assert global_batches(workers(dataset, 2), epoch=1, first=first) == whole[first:]
    assert global_batches(workers(dataset, 1), epoch=1, first=3, last=11) == whole[3:11]


@pytest.mark.usefixtures("ray_cluster")
def test_every_step_counts_the_targets_of_the_global_batch(dataset: Dataset) -> None:
    pad = special_ids(dataset.sizes.characters).pad
    for steps in zip(*(feed.batches(0) for feed in workers(dataset, 2)), strict=True):
        targets = sum(
            int((batch.response_BT[batch.counted_B, 1:] != pad).sum()) for step in steps for batch in step.micro_batches
        )
        assert {step.targets for step in steps} == {targets}


def test_filler_rows_are_not_counted_and_shapes_agree(dataset: Dataset, ray_cluster: None) -> None:
    for feed in workers(dataset, 2, accumulation=2):
        for step in feed.batches(0):
            assert len(step.micro_batches) == 2
            for batch in step.micro_batches:
                assert len(batch.context_BS) == len(batch.counted_B) == BATCH // 4
                assert (batch.context_BS[:, 0] != special_ids(dataset.sizes.characters).pad).all()


def test_epochs_and_seeds_change_the_order_and_validation_keeps_it(dataset: Dataset) -> None:
    def ids(feed: Feed, epoch: int) -> list[int]:
        table = feed.order.read(epoch, 0, ["example_id", "context", "response"])
        found = table["example_id"].to_numpy()
        equal_lengths = np.zeros(len(found), np.int64)
        return [int(i) for rows in feed.order.batches(epoch, 0, equal_lengths) for i in found[rows]]

    assert ids(make_feed(dataset), 0) != ids(make_feed(dataset), 1)
    assert ids(make_feed(dataset), 0) != ids(make_feed(dataset, seed=4), 0)
    plain = make_feed(dataset, shuffled=False)
    assert ids(plain, 0) == ids(plain, 1) == list(range(5 * BATCH))


def test_infilling_depends_on_example_and_epoch_alone(dataset: Dataset, ray_cluster: None) -> None:
    def infilled(feeds: list[Feed], epoch: int) -> dict[int, list[int]]:
        pad = special_ids(dataset.sizes.characters).pad
        found = {}
        for feed in feeds:
            for step in feed.batches(epoch):
                for batch in step.micro_batches:
                    assert batch.infilled_BU is not None
                    for i, row in zip(batch.example_id_B.tolist(), batch.infilled_BU.tolist(), strict=True):
                        found[i] = [c for c in row if c != pad]
        return found

    first = infilled(workers(dataset, 1), 0)
    assert infilled(workers(dataset, 2), 0) == first
    second = infilled(workers(dataset, 1), 1)
    assert sum(first[i] != second[i] for i in first) > len(first) / 4


def test_batches_are_of_like_length(dataset: Dataset) -> None:
    feed = make_feed(dataset, window_batches=25)
    table = feed.order.read(0, 0, ["context", "response"])
    lengths = np.array([len(c) for c in table["context"].to_pylist()])
    cells = sum(lengths[rows].max() * len(rows) for rows in feed.order.batches(0, 0, lengths))
    random = np.random.default_rng(0).permutation(len(lengths))
    random_cells = sum(lengths[random[i : i + BATCH]].max() * BATCH for i in range(0, len(random), BATCH))
    assert 1 - lengths.sum() / cells < 0.5 * (1 - lengths.sum() / random_cells)


def test_batches_are_tensors_on_the_cpu(dataset: Dataset, ray_cluster: None) -> None:
    batch = next(iter(list(make_feed(dataset).batches(0, 0, 1)))).micro_batches[0]
    assert batch.context_BS.dtype == torch.int32
    assert batch.example_id_B.dtype == torch.int64
    assert batch.profiles_BPW.ndim == 3


# ------------------------------------------------------------------------------------- a window's way to the worker


def arrays(batch: Batch) -> dict[str, list]:
    return {f.name: getattr(batch, f.name).tolist() for f in fields(batch) if getattr(batch, f.name) is not None}


@pytest.mark.parametrize("model", [ModelConfig(), AR], ids=["infilling", "characters"])
@pytest.mark.parametrize("id_type", [np.uint16, np.int32])
def test_a_window_at_once_is_its_batches_one_by_one(dataset: Dataset, model: ModelConfig, id_type: type) -> None:
    layout = Layout.of(model, dataset.sizes)
    window = Window(random_examples(range(60)).select(layout.columns), layout)
    rows_NB = np.random.default_rng(0).permutation(60).reshape(10, 6)
    packed = window.batches(rows_NB, Draws(1, 2), EXACT)
    counted_B = np.ones(6, np.uint8)
    packed["counted_B"] = packed["example_id_B"]._replace(values=np.tile(counted_B, 10))
    table = _to_table(packed, np.arange(10), id_type)
    parts = [*_from_table(table[:3], pin=False), *_from_table(table[3:], pin=False)]
    assert [targets for _, targets in parts] == list(range(10))
    for (batch, _), rows in zip(parts, rows_NB, strict=True):
        alone = window.batch(rows, counted_B.view(bool), Draws(1, 2))
        assert arrays(batch) == {name: array.tolist() for name, array in alone.items()}
        assert batch.counted_B.dtype == torch.bool
        assert batch.context_BS.dtype == torch.int32


def test_static_shapes_are_few_and_only_pad(dataset: Dataset) -> None:
    ids = special_ids(dataset.sizes.characters)
    plain = make_feed(dataset)
    static = Feed(plain.order, plain.layout, plain.place, FeedConfig(), Widths.static(dataset.rules))
    shapes = set()
    for window in range(plain.order.windows):
        pairs = zip(*(_from_table(prepare_window(0, window, f), pin=False) for f in (plain, static)), strict=True)
        for (narrow, targets), (wide, same_targets) in pairs:
            assert targets == same_targets
            shapes.add(tuple(tuple(getattr(wide, f.name).shape) for f in fields(wide)))
            for f in fields(wide):
                a, b = getattr(narrow, f.name), getattr(wide, f.name)
                assert torch.equal(b[tuple(slice(size) for size in a.shape)], a), f.name
            assert (wide.context_BS != ids.pad).sum() == (narrow.context_BS != ids.pad).sum()
            assert (wide.response_BT.shape[1], wide.infilled_BU.shape[1]) == (18, 18)
            assert wide.context_BS.shape[1] % 16 == 0
    assert len(shapes) <= 7


def test_windows_are_pinned_once_for_all_their_batches(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # without a GPU there is no pinned memory
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    feed = make_feed(dataset)
    batches = [batch for batch, _ in _from_table(prepare_window(0, 0, feed), pin=True)]
    storages = {tensor.untyped_storage().data_ptr() for tensor in pinned}
    found = {getattr(b, f.name).untyped_storage().data_ptr() for b in batches for f in fields(b)}
    assert found == storages
    assert len(storages) == len(fields(Batch))


@pytest.mark.usefixtures("ray_cluster")
def test_a_block_that_ray_data_cuts_within_a_step_changes_nothing(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = make_feed(dataset, accumulation=4)
    whole = [[arrays(b) for b in step.micro_batches] for step in feed.batches(0, 7, 19)]
    monkeypatch.setattr(DataContext.get_current(), "target_max_block_size", 3000)
    assert [[arrays(b) for b in step.micro_batches] for step in feed.batches(0, 7, 19)] == whole


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
    steps = make_feed(dataset, window_batches=1).batches(0)
    next(steps)
    assert feed_threads()
    steps.close()
    assert none_after_a_while() == []


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_in_the_loop_around_leaves_nothing_running(dataset: Dataset) -> None:
    def train() -> None:
        for step in make_feed(dataset, window_batches=1).batches(0):
            raise RuntimeError(f"loss of {step.targets} targets is not finite")

    with pytest.raises(RuntimeError, match="not finite"):
        train()
    assert none_after_a_while() == []


@pytest.mark.usefixtures("ray_cluster")
def test_an_error_in_a_window_reaches_the_training_step(dataset: Dataset) -> None:
    feed = make_feed(dataset)
    feed.order = replace(feed.order, split=Split("train", EXAMPLES, 1, (RowGroup("missing.parquet", 0, EXAMPLES),)))
    with pytest.raises(Exception, match=r"missing\.parquet"):
        next(feed.batches(0))
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


def test_a_window_of_large_batches_is_still_small_enough_to_read() -> None:
    feed = FeedConfig()
    assert [feed.batches_of_window(size) for size in (64, 1024, 8192, 65_536, 1 << 20)] == [256, 256, 32, 4, 1]
    assert FeedConfig(window_batches=8).batches_of_window(64) == 8
