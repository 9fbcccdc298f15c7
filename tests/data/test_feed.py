"""The feed's order does not depend on who reads it, and an epoch starts anywhere."""

import numpy as np
import pytest
import torch
from prepared import write_dataset

from arplus.config import FeedConfig, ModelConfig, special_ids
from arplus.data.collate import Layout
from arplus.data.dataset import Dataset
from arplus.data.feed import Feed, Order, Place, Step

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
