"""The order of an epoch, and how a global batch is dealt out."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.prepared import write_dataset
from hypothesis import given
from hypothesis import strategies as st

from arplus import storage
from arplus.data.dataset import Dataset, RowGroup, Split
from arplus.data.sampler import EpochSampler, deal
from arplus.errors import UsageError

BATCH = 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder, {"train": [[50, 31, 22], [64, 36]]})


def make(
    split: Split, *, batch_size: int = BATCH, window_batches: int = 5, seed: int = 3, shuffled: bool = True
) -> EpochSampler:
    return EpochSampler(split=split, batch_size=batch_size, window_batches=window_batches, seed=seed, shuffled=shuffled)


@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 9), st.integers(1, 4), st.booleans())
def test_windows_take_every_row_once(groups: list[int], batch_size: int, window_batches: int, shuffled: bool) -> None:
    split = Split("train", sum(groups), 1, tuple(RowGroup("file", i, rows) for i, rows in enumerate(groups)))
    sampler = make(split, batch_size=batch_size, window_batches=window_batches, shuffled=shuffled)
    found, sizes = [], []
    for window in range(sampler.windows):
        pieces = sampler.pieces(1, window)
        found += [(group.index, begin + i) for group, begin, rows in pieces for i in range(rows)]
        sizes.append(sum(rows for _, _, rows in pieces))
    assert sorted(found) == [(g, i) for g, rows in enumerate(groups) for i in range(rows)]
    assert sizes[:-1] == [batch_size * window_batches] * (sampler.windows - 1)
    assert sampler.steps == -(-sum(groups) // batch_size)


def ids(sampler: EpochSampler, epoch: int) -> list[list[int]]:
    """The batches of an epoch, by example ids."""
    found = []
    for window in range(sampler.windows):
        table = sampler.read(epoch, window, ["example_id", "context"])
        lengths = np.array([len(context) for context in table["context"].to_pylist()])
        found += [table["example_id"].to_numpy()[rows].tolist() for rows in sampler.batches(epoch, window, lengths)]
    return found


@pytest.mark.parametrize("damage", ["cut short", "changed"])
def test_a_damaged_file_is_the_files_fault_not_the_stores(s3_server: Any, tmp_path: Path, damage: str) -> None:
    """Which would be asked again for ten minutes."""
    data = write_dataset(tmp_path, {"train": [[500]]})
    (file,) = Path(data.uri, "train").iterdir()
    whole = file.read_bytes()
    wrong = whole[: len(whole) // 2] if damage == "cut short" else whole[:50] + bytes(len(whole) // 2) + whole[-2000:]
    uri = s3_server.uri(f"damaged/{damage}.parquet")
    storage.write_bytes(uri, wrong)
    split = Split("train", 500, 1, (RowGroup(uri, 0, 500),))
    with pytest.raises(UsageError, match=rf"^{uri}: is damaged \(.*\); bring it back from a copy"):
        make(split).read(0, 0, ["context"])


def test_epochs_and_seeds_change_the_order(dataset: Dataset) -> None:
    split = dataset.split("train")
    first = ids(make(split), 0)
    assert ids(make(split), 0) == first
    others = [ids(make(split), 1), ids(make(split, seed=4), 0), ids(make(split, window_batches=2), 0)]
    for other in others:
        assert [set(batch) for batch in other] != [set(batch) for batch in first]
        assert sorted(i for batch in other for i in batch) == list(range(203))
    assert [len(batch) for batch in first] == [BATCH] * 25 + [3]


def test_validation_keeps_the_order_of_the_files_but_for_the_lengths_in_a_window(dataset: Dataset) -> None:
    plain = make(dataset.split("train"), shuffled=False)
    whole = ids(plain, 0)
    assert ids(plain, 1) == whole
    window = 5 * BATCH
    for w in range(plain.windows):
        table = plain.read(0, w, ["example_id", "context"]).to_pylist()
        by_length = [row["example_id"] for row in sorted(table, key=lambda row: len(row["context"]))]
        assert sorted(by_length) == list(range(w * window, min((w + 1) * window, 203)))
        assert [i for batch in whole[w * 5 : (w + 1) * 5] for i in batch] == by_length


def test_batches_of_an_epoch_are_random_ones_of_a_window_in_order_of_length(dataset: Dataset) -> None:
    sampler = make(dataset.split("train"), batch_size=20, window_batches=5)
    lengths = np.repeat(np.arange(10), 10)
    batches = sampler.batches(0, 0, lengths)
    assert sorted(np.concatenate(batches)) == list(range(100))
    for rows in batches:
        assert (np.diff(lengths[rows]) >= 0).all()
    # Of 20 random rows of ten lengths a batch has some 8.9 different ones, where like would have gone to like 2.
    assert np.mean([len(set(lengths[rows])) for rows in batches]) > 6
    means = [float(np.mean([lengths[r].mean() for r in sampler.batches(e, 0, lengths)[:1]])) for e in range(200)]
    assert abs(np.mean(means) - 4.5) < 5 * 2.87 / np.sqrt(20 * 200)


@given(st.integers(1, 60), st.integers(1, 12), st.integers(1, 4), st.integers(1, 3))
def test_a_global_batch_is_dealt_out_like_cards(n: int, batch_size: int, workers: int, accumulation: int) -> None:
    rows = np.random.default_rng(n).permutation(n)
    dealt, sizes = deal(rows, batch_size, workers, accumulation)
    batches = [rows[i : i + batch_size].tolist() for i in range(0, n, batch_size)]
    assert sizes.shape == (workers, len(batches), accumulation)
    parts = iter(np.split(dealt, np.cumsum(sizes)[:-1]))
    M = workers * accumulation
    for worker in range(workers):
        for batch in batches:
            for a in range(accumulation):
                assert next(parts).tolist() == batch[worker * accumulation + a :: M]
