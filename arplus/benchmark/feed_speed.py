"""How fast the data feed is: examples per second through Ray Data to tensors, beside Hugging Face's ``datasets``.

Both make the same batches.
"""

import functools
from statistics import median

import pyarrow.parquet as pq
import ray

from arplus import storage
from arplus.benchmark.baselines import list_batches
from arplus.benchmark.figures import Result, rate, size
from arplus.benchmark.options import DataBenchmark
from arplus.benchmark.usage import Usage
from arplus.cluster import connection
from arplus.config import ModelConfig
from arplus.data.collate import BatchSpec
from arplus.data.dataset import Dataset
from arplus.data.loader import RankLoader
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker


def measure(config: DataBenchmark) -> Result:
    """Joins Ray, and measures the feed on its cluster."""
    connection.connect()
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
        examples = sum(len(b.example_id_B) for step in loader.batches(0, 0, steps) for b in step.micro_batches)
    examples_per_second = examples / seconds
    compared: float | str = "left out"
    if config.compared_steps:
        compared = list_batches.examples_per_second(sampler, spec, config.compared_steps)
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
            ("examples/s per core", f"{rate(examples_per_second / cores)} ({cores:g} logical CPUs in the cluster)"),
            (
                "examples per CPU second",
                f"{rate(examples / cpu_seconds)} (the cluster's processes on this machine)",
            ),
            ("datasets + DataLoader", rate(compared) + " examples/s" if isinstance(compared, float) else compared),
            ("ratio", f"{ratio:.1f}" if ratio else "none"),
            ("bytes read per pass", f"{size(read)}, {read / examples:.0f} bytes per example"),
            ("peak memory", f"{size(usage.peak_memory_bytes)} (PSS of all processes, object store included)"),
        ],
    )


def _pass(loader: RankLoader, epoch: int, steps: int) -> tuple[float, float]:
    """Wall and CPU seconds of one pass."""
    with Usage(memory=False) as usage:
        found = sum(1 for _ in loader.batches(epoch, 0, steps))
    assert found == steps
    return usage.seconds, usage.cpu_seconds


def bytes_read(sampler: EpochSampler, spec: BatchSpec, steps: int) -> int:
    """Bytes of the column chunks that the windows of a pass read, as they lie in the files."""
    wanted = set(spec.columns)
    total = 0
    for window in range(-(-steps // sampler.window_batches)):
        for place, _, _ in sampler.pieces(0, window):
            group = _metadata(place.file).row_group(place.index)
            columns = (group.column(i) for i in range(group.num_columns))
            total += sum(c.total_compressed_size for c in columns if c.path_in_schema.split(".")[0] in wanted)
    return total


@functools.cache
def _metadata(file: str) -> pq.FileMetaData:
    filesystem, path = storage.resolve(file)
    return pq.read_metadata(path, filesystem=filesystem)
