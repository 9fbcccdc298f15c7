"""What can be set of each benchmark. Nothing heavy is imported here: a command line is read before Ray and torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le

from arplus.config import ExampleRules, FeedConfig, Required, RequiredText, TrainConfig

WINDOW = 64
"""Batches of the window that replies are given to."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where a benchmark's figures go beside the table."""

    json: str | None = None
    """URI of a JSON file to write."""
    mlflow: str | None = None
    """MLflow tracking URI; the figures become a run there."""
    experiment: str = "benchmark"
    """MLflow experiment."""


@dataclass(frozen=True, kw_only=True)
class PoolBenchmark(Output):
    """What the benchmarks that take batches of a pool have in common."""

    data: str | None = None
    """URI of a prepared data set to take the examples from. By default they are random, with the real ones' lengths."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples per batch."""
    compare: bool = True
    """Measure what ours is compared with too. This takes most of the time."""


@dataclass(frozen=True, kw_only=True)
class TrainBenchmark(PoolBenchmark):
    """Measures the train step of AR+ at its real size."""

    precision: Literal["auto", "fp32", "bf16"] = TrainConfig.precision
    """Arithmetic of our forward pass; the others run in fp32."""
    compile: Literal["auto", "on", "off"] = TrainConfig.compile
    """Compile our step, on batches of one shape. auto compiles on GPUs."""
    batches: Annotated[int, Gt(0)] = 2
    """Batches that each side takes per round."""
    rounds: Annotated[int, Gt(0)] = 4
    """Rounds to take the medians of. Some steps of each side before them are not counted."""


@dataclass(frozen=True, kw_only=True)
class GenerateBenchmark(PoolBenchmark):
    """Measures replies of AR+ at its real size with random weights, all of the same length."""

    characters: Annotated[int, Gt(0)] = ExampleRules.max_utterance_characters
    """Characters of every reply."""
    batches: Annotated[int, Gt(0), Le(WINDOW)] = 8
    """Batches of the window that are timed in every round."""
    rounds: Annotated[int, Gt(0)] = 3
    """Rounds to take the medians of. One batch of ours before them is not counted."""


@dataclass(frozen=True, kw_only=True)
class ScaleBenchmark(Output):
    """Measures one and two workers on this machine and predicts more of them, on GPUs."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    batch_size: Annotated[int, Gt(1)] = 32
    """Examples per worker and step, in the measurement."""
    steps: Annotated[int, Gt(0)] = 4
    """Steps to take a median of. One step before them is not counted."""
    gpu_examples_per_second: Annotated[float, Gt(0)] = 15_250
    """Rate of one GPU at --gpu-batch-size, for the prediction; take the figure of jobs/benchmark.py train --batch-size
    on that GPU. The default is a guess for an H100 (±25 %), from counts of its kernels and of the bytes that they move.
    """
    gpu_batch_size: Annotated[int, Gt(0)] = 1024
    """Examples per GPU and step, in the prediction."""
    gpus_per_node: Annotated[int, Gt(0)] = 8
    """GPUs that share a machine."""
    node_bandwidth_gb: Annotated[float, Gt(0)] = 300
    """GB/s that a GPU sends to others of its machine (NVLink)."""
    network_bandwidth_gb: Annotated[float, Gt(0)] = 40
    """GB/s that a GPU sends to other machines."""
    feed_examples_per_second: Annotated[float, Gt(0)] = 100_000
    """Examples per second that one core of the feed reads; take the figure of jobs/benchmark.py data."""
    feed_cores: Annotated[int, Gt(0)] = 8
    """Cores per GPU that the feed may use. A window is read by one of all these cores, once for all GPUs."""


@dataclass(frozen=True, kw_only=True)
class DataBenchmark(Output):
    """Measures the data feed of one training worker."""

    data: Annotated[RequiredText, Required("the URI of a prepared data set (make one with jobs/prepare.py)")] = ""
    """URI of a prepared data set; its training split is read."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples per batch."""
    shuffle_window_batches: Annotated[int, Gt(0)] = FeedConfig.shuffle_window_batches
    """Batches per window; see jobs/train.py."""
    passes: Annotated[int, Gt(0)] = 5
    """Passes to take the median of. One pass before them is not counted."""
    max_steps: Annotated[int, Gt(0)] | None = None
    """Most batches per pass. By default a whole epoch."""
    compared_steps: Annotated[int, Ge(0)] = 512
    """Batches per pass of what is compared, datasets with a DataLoader, which is slower. 0 leaves it out."""


@dataclass(frozen=True, kw_only=True)
class PrepareBenchmark(Output):
    """Measures the preparation of raw records."""

    input: str | None = None
    """URI of raw records. By default they are generated."""
    output: str | None = None
    """URI of the data set to make, which stays. By default it is made in a temporary folder."""
    records: Annotated[int, Gt(0)] = 400_000
    """Records to generate without --input; 4.5 % of them repeat an earlier one."""


@dataclass(frozen=True, kw_only=True)
class FaultsBenchmark(Output):
    """Kills a worker of a training run and measures how the run goes on."""

    preset: str = "arplus"
    """The model that is trained, at its full size."""
    tiny: bool = False
    """Train the preset's tiny form instead."""
    workers: Annotated[int, Gt(0)] = 2
    """Training workers; one of them is killed."""
    batch_size: Annotated[int, Gt(0)] = 16
    """Examples per optimizer step."""
    steps: Annotated[int, Ge(8)] = 24
    """Optimizer steps of the run; the kill falls in their middle."""
    records: Annotated[int, Gt(0)] = 2_000
    """Records to generate and train on."""
