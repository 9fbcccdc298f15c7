"""What a task makes of a window, and what the server does with it."""

import pickle
import subprocess
import sys
from collections.abc import Generator
from typing import Any, cast

import pyarrow as pa
import pytest
import ray
import torch
from helpers.prepared import write_dataset

from arplus.config import ModelConfig
from arplus.data import windows
from arplus.data.collate import BatchSpec
from arplus.data.dataset import Dataset
from arplus.data.packing import unpack
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker, WindowServer, unpickle
from arplus.errors import ArplusError, ResourceError, UsageError


@pytest.fixture
def dataset(tmp_path: Any) -> Dataset:
    return write_dataset(tmp_path, {"train": [[50, 31, 22]]})


def test_a_task_does_without_torch() -> None:
    code = "import arplus.data.windows, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("error", [UsageError("no such file"), ResourceError("the storage is away")])
def test_what_a_task_could_not_do_is_raised_where_its_window_is_needed(error: ArplusError) -> None:
    with pytest.raises(type(error), match=str(error)):
        unpickle(pa.py_buffer(pickle.dumps(error)))


def test_a_large_part_becomes_tensors_in_chunks(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = EpochSampler(split=dataset.split("train"), batch_size=8, window_batches=5, seed=3, shuffled=True)
    spec = BatchSpec.of(ModelConfig(), dataset.sizes)
    maker = WindowMaker(sampler=sampler, spec=spec, workers=2, accumulation=2)
    ((whole,), _) = maker.make(0, 1)
    monkeypatch.setattr(windows, "CHUNK_EXAMPLES", 10)  # of a worker: two steps of four each
    chunks, _ = maker.make(0, 1)
    assert [len(chunk.targets) for chunk in chunks] == [2, 2, 1]
    assert [t for chunk in chunks for t in chunk.targets.tolist()] == whole.targets.tolist()
    assert [n for chunk in chunks for n in chunk.examples.tolist()] == [8] * 5
    assert [n for chunk in maker.make(0, 2)[0] for n in chunk.examples.tolist()] == [8, 8, 7]
    found = [batch for chunk in chunks for batch in unpack(chunk.micro_batches)]
    for batch, same in zip(found, unpack(whole.micro_batches), strict=True):
        assert torch.equal(batch.example_id_B, same.example_id_B)
        assert torch.equal(batch.context.ids, same.context.ids)
        assert torch.equal(batch.speaker_N, same.speaker_N)


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
