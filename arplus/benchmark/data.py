"""The feed: examples per second through Ray Data to tensors, against Hugging Face's ``datasets`` + ``DataLoader``.

Both make the same batches. The other side is given its rows decoded and in memory, and collates as projects that use it
do: rows to Python lists, padded in Python.
"""

import os
import time
from itertools import islice
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from torch.utils.data import DataLoader

from arplus import storage
from arplus.benchmark.machine import Usage
from arplus.benchmark.plain import Collate
from arplus.benchmark.report import NOT_INSTALLED, Result, rate, size
from arplus.benchmark.settings import DataBenchmark
from arplus.config import ModelConfig
from arplus.data.collate import BatchSpec, Window
from arplus.data.dataset import Dataset
from arplus.data.loader import RankLoader
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker


def measure(config: DataBenchmark) -> Result:
    """Measures the feed on the connected Ray cluster."""
    dataset = Dataset.open(storage.absolute(config.data))
    sampler = EpochSampler(
        split=dataset.split("train"),
        batch_size=config.batch_size,
        window_batches=config.shuffle_window_batches,
        seed=0,
        shuffled=True,
    )
    spec = BatchSpec.of(ModelConfig(), dataset.sizes)
    loader = RankLoader(WindowMaker(sampler=sampler, spec=spec))
    steps = min(loader.steps, config.max_steps or loader.steps)
    cores = ray.cluster_resources()["CPU"]

    _pass(loader, 0, steps)
    passes = [_pass(loader, 1 + i, steps) for i in range(config.passes)]
    seconds, cpu_seconds = (median(column) for column in zip(*passes, strict=True))
    with Usage(memory=True) as usage:
        examples = _count(loader, steps)
    examples_per_second = examples / seconds
    compared = compare(sampler, spec, config) if config.compared_steps else "left out"
    ratio = examples_per_second / compared if isinstance(compared, float) else None
    read = bytes_read(sampler, spec, steps)
    return Result(
        figures={
            "examples_per_second": examples_per_second,
            "examples_per_second_per_core": examples_per_second / cores,
            "examples_per_cpu_second": examples / cpu_seconds,
            "ratio_datasets": ratio,
            "bytes_read": read,
            "peak_memory_bytes": usage.peak_memory_bytes,
        },
        table=[
            ("examples/s to tensors", f"{rate(examples_per_second)} (median of {config.passes} passes)"),
            ("examples/s a core", f"{rate(examples_per_second / cores)} ({cores:g} logical CPUs in the cluster)"),
            ("examples a CPU second", f"{rate(examples / cpu_seconds)} (all processes of the cluster on this machine)"),
            ("datasets + DataLoader", rate(compared) + " examples/s" if isinstance(compared, float) else compared),
            ("ratio", f"{ratio:.1f}" if ratio else "none"),
            ("bytes read a pass", f"{size(read)}, {read / examples:.0f} bytes an example"),
            ("peak memory", f"{size(usage.peak_memory_bytes)} (PSS of all processes, object store included)"),
        ],
    )


def _pass(loader: RankLoader, epoch: int, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of one pass."""
    with Usage(memory=False) as usage:
        found = sum(1 for _ in loader.batches(epoch, 0, steps))
    assert found == steps
    return usage.seconds, usage.cpu_seconds


def _count(loader: RankLoader, steps: int) -> int:
    """Examples of a pass."""
    return sum(len(batch.example_id_B) for step in loader.batches(0, 0, steps) for batch in step.micro_batches)


def bytes_read(sampler: EpochSampler, spec: BatchSpec, steps: int) -> int:
    """Bytes of the column chunks that the windows of a pass read, as they lie in the files."""
    wanted = set(spec.columns)
    sizes: dict[str, list[int]] = {}
    total = 0
    for window in range(-(-steps // sampler.shuffle_window_batches)):
        for group, _, _ in sampler.pieces(0, window):
            if group.file not in sizes:
                filesystem, path = storage.resolve(group.file)
                with pq.ParquetFile(path, filesystem=filesystem) as file:
                    sizes[group.file] = [
                        _group_bytes(file.metadata.row_group(i), wanted) for i in range(file.num_row_groups)
                    ]
            total += sizes[group.file][group.index]
    return total


def _group_bytes(group: pq.RowGroupMetaData, wanted: set[str]) -> int:
    columns = (group.column(i) for i in range(group.num_columns))
    return sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in wanted)


def compare(sampler: EpochSampler, spec: BatchSpec, config: DataBenchmark) -> float | str:
    """Examples/s of ``datasets`` + ``DataLoader`` on the same batches, or why there is no figure.

    Measured in this process and with a process a core; the faster one counts.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: nothing here needs the network
    try:
        import datasets
    except ImportError:
        return NOT_INSTALLED
    tables, batches = first_batches(sampler, spec, min(config.compared_steps, sampler.steps))
    table = pa.concat_tables(tables).combine_chunks()
    rows = datasets.Dataset(datasets.table.InMemoryTable(table))
    best = 0.0
    for workers in (0, os.cpu_count() or 1):
        loader: Any = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=Collate(spec),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        rates = [_loader_rate(loader) for _ in range(4)]
        best = max(best, median(rates[1:]))
    return best


def first_batches(sampler: EpochSampler, spec: BatchSpec, steps: int) -> tuple[list[pa.Table], list[list[int]]]:
    """The windows of an epoch's first ``steps`` batches, and the rows of these batches in the windows' table."""
    tables: list[pa.Table] = []
    batches: list[list[int]] = []
    first = 0
    for window in range(-(-steps // sampler.shuffle_window_batches)):
        table = sampler.read(0, window, spec.columns)
        lengths = Window(table, spec).context.lengths
        batches += [(first + rows).tolist() for rows in sampler.batches(0, window, lengths)]
        tables.append(table)
        first += len(table)
    return tables, list(islice(batches, steps))


def _loader_rate(loader: "DataLoader[dict[str, torch.Tensor]]") -> float:
    start = time.perf_counter()
    examples = sum(len(batch["context_BS"]) for batch in loader)
    return examples / (time.perf_counter() - start)
