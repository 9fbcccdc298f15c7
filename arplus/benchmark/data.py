"""The feed: examples a second through Ray Data to padded tensors, against Hugging Face's ``datasets`` + ``DataLoader``.

Both make the same length-sorted batches. The other side is given its rows decoded and in memory, and collates as
projects that use it do: rows to Python lists, padded in Python.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from statistics import median
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from annotated_types import Ge, Gt
from torch.utils.data import DataLoader

from arplus import storage
from arplus.benchmark.machine import Usage
from arplus.benchmark.plain import Collate
from arplus.benchmark.report import NOT_INSTALLED, Output, Result, rate, size
from arplus.config import FeedConfig, ModelConfig, special_ids
from arplus.data.collate import Layout, Window
from arplus.data.dataset import Dataset
from arplus.data.feed import Feed, Order, Place


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Output):
    """Measures the data feed of one training worker."""

    data: str = ""
    """URI of a prepared data set; its training split is read."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples a batch."""
    window_batches: Annotated[int, Gt(0)] = FeedConfig.window_batches
    """Batches a window; see jobs/train.py."""
    passes: Annotated[int, Gt(0)] = 5
    """Passes that the median is taken of, after one that is not counted."""
    max_steps: Annotated[int, Gt(0)] | None = None
    """Batches a pass at most; by default a whole epoch."""
    compared_steps: Annotated[int, Ge(0)] = 512
    """Batches a pass of the datasets + DataLoader side, which is slower; 0 leaves it out."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.data:
            yield "data", "is required: the URI of a prepared data set (make one with jobs/prepare.py)"


def measure(config: DataBenchmark) -> Result:
    """Measures the feed on the connected Ray cluster."""
    dataset = Dataset.open(storage.absolute(config.data))
    order = Order(
        split=dataset.split("train"),
        batch_size=config.batch_size,
        window_batches=config.window_batches,
        seed=0,
        shuffled=True,
    )
    layout = Layout.of(ModelConfig(), dataset.sizes)
    feed = Feed(order, layout, Place(), FeedConfig(window_batches=config.window_batches))
    steps = min(order.steps, config.max_steps or order.steps)
    cores = ray.cluster_resources()["CPU"]

    _pass(feed, 0, steps)
    passes = [_pass(feed, 1 + i, steps) for i in range(config.passes)]
    seconds, cpu_seconds = (median(column) for column in zip(*passes, strict=True))
    with Usage(memory=True) as usage:
        examples, padding = _count(feed, steps)
    examples_per_second = examples / seconds
    compared = compare(order, layout, config) if config.compared_steps else "left out"
    ratio = examples_per_second / compared if isinstance(compared, float) else None
    read = bytes_read(order, layout, steps)
    return Result(
        figures={
            "examples_per_second": examples_per_second,
            "examples_per_second_per_core": examples_per_second / cores,
            "examples_per_cpu_second": examples / cpu_seconds,
            "ratio_datasets": ratio,
            "padding_share": padding,
            "bytes_read": read,
            "peak_memory_bytes": usage.peak_memory_bytes,
        },
        table=[
            ("examples/s to padded tensors", f"{rate(examples_per_second)} (median of {config.passes} passes)"),
            ("examples/s a core", f"{rate(examples_per_second / cores)} ({cores:g} logical CPUs in the cluster)"),
            ("examples a CPU second", f"{rate(examples / cpu_seconds)} (all processes of the cluster on this machine)"),
            ("datasets + DataLoader", rate(compared) + " examples/s" if isinstance(compared, float) else compared),
            ("ratio", f"{ratio:.1f}" if ratio else "none"),
            ("padding in context slots", f"{padding:.1%}"),
            ("bytes read a pass", f"{size(read)}, {read / examples:.0f} bytes an example"),
            ("peak memory", f"{size(usage.peak_memory_bytes)} (PSS of all processes, object store included)"),
        ],
    )


def _pass(feed: Feed, epoch: int, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of one pass."""
    with Usage(memory=False) as usage:
        found = sum(1 for _ in feed.batches(epoch, 0, steps))
    assert found == steps
    return usage.seconds, usage.cpu_seconds


def _count(feed: Feed, steps: int) -> tuple[int, float]:
    """Examples of a pass, and the share of its context slots that is padding."""
    pad = special_ids(feed.layout.sizes.characters).pad
    examples = slots = real = 0
    for step in feed.batches(0, 0, steps):
        for batch in step.micro_batches:
            examples += int(batch.counted_B.sum())
            slots += batch.context_BS.numel()
            real += int((batch.context_BS != pad).sum())
    return examples, 1 - real / slots


def bytes_read(order: Order, layout: Layout, steps: int) -> int:
    """Bytes of the column chunks that the windows of a pass read, as they lie in the files."""
    wanted = set(layout.columns)
    sizes: dict[str, list[int]] = {}
    total = 0
    for window in range(-(-steps // order.window_batches)):
        for group, _, _ in order.pieces(0, window):
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


def compare(order: Order, layout: Layout, config: DataBenchmark) -> float | str:
    """Examples/s of ``datasets`` + ``DataLoader`` on the same batches, or why there is no figure.

    Measured in this process and with a process a core; the faster one counts.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: nothing here needs the network
    try:
        import datasets
    except ImportError:
        return NOT_INSTALLED
    tables, batches = first_batches(order, layout, min(config.compared_steps, order.steps))
    table = pa.concat_tables(tables).combine_chunks()
    rows = datasets.Dataset(datasets.table.InMemoryTable(table))
    best = 0.0
    for workers in (0, os.cpu_count() or 1):
        loader: Any = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=Collate(layout),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        rates = [_loader_rate(loader) for _ in range(4)]
        best = max(best, median(rates[1:]))
    return best


def first_batches(order: Order, layout: Layout, steps: int) -> tuple[list[pa.Table], list[list[int]]]:
    """The windows of an epoch's first ``steps`` batches, and the rows of these batches in the windows' table."""
    tables: list[pa.Table] = []
    batches: list[list[int]] = []
    first = 0
    for window in range(-(-steps // order.window_batches)):
        table = order.read(0, window, layout.columns)
        lengths = Window(table, layout).lengths
        batches += [(first + rows).tolist() for rows in order.batches(0, window, lengths)]
        tables.append(table)
        first += len(table)
    return tables, list(islice(batches, steps))


def _loader_rate(loader: "DataLoader[dict[str, torch.Tensor]]") -> float:
    start = time.perf_counter()
    examples = sum(len(batch["context_BS"]) for batch in loader)
    return examples / (time.perf_counter() - start)
