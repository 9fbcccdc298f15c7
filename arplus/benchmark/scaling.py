"""Whether a cluster scales: one and two workers measured, and a small model that predicts up to 64 GPUs.

A step of W workers of b examples each takes

    fixed + b · example                  measured with one worker at two batch sizes; on GPUs the rate at b is given
    + bytes(stage, W) / bandwidth        gradients and weights that a worker sends; on this machine the bandwidth is
    + calls(stage) · latency             measured with the same processes, on GPUs it is assumed
    max(…, W · b / feed)                 never less than the feed needs, which reads each window once for all workers
    + checkpoint / steps between         seconds in which training waits for a checkpoint

Nothing is overlapped, as in our engine. The prediction for two workers stands beside what two workers were seen to do.
"""

import multiprocessing
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import TypeVar

import torch
import torch.distributed as dist

from arplus.benchmark.figures import Result, rate
from arplus.benchmark.options import ScaleBenchmark
from arplus.benchmark.pool import Pool, random_examples
from arplus.benchmark.step_speed import engine_step, run_config
from arplus.benchmark.usage import seconds
from arplus.config import TrainConfig, VocabularySizes
from arplus.model.cost import outline
from arplus.process import environment
from arplus.training.group import process_group

T = TypeVar("T")

WORKERS = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of GPUs that are predicted."""
LATENCY, CHECKPOINT_S = 30e-6, 5.0
"""Seconds of one collective call on GPUs, and in which training waits for a checkpoint; assumed."""


@dataclass(frozen=True)
class Costs:
    """What the model of a step is made of; seconds and bytes per second."""

    fixed: float
    """A worker's step apart from its examples: optimizer, engine."""
    example: float
    bandwidth: float
    """Bytes per second that a worker sends while all do."""
    latency: float
    """Of one collective call."""
    feed: float = float("inf")
    """Examples per second that the feed makes for all workers together."""
    checkpoint: float = 0.0
    """Share of the time in which training waits for checkpoints."""


def bytes_sent(stage: int, workers: int, parameters: int) -> float:
    """Bytes that one worker sends in a step, fp32, ring collectives.

    Stage 0: an all-reduce of the gradients, which is a reduce-scatter and an all-gather of (W - 1) / W each. Stages 1
    and 2: a reduce-scatter of the gradients and an all-gather of the new weights. Stage 3: the weights are gathered
    in the forward and in the backward pass.
    """
    once = 4 * parameters * (workers - 1) / workers
    return once * (3 if stage == 3 else 2)


def step_seconds(costs: Costs, stage: int, workers: int, batch_size: int, parameters: int) -> float:
    """Seconds that a step takes; see the module's docstring."""
    sent = bytes_sent(stage, workers, parameters) / costs.bandwidth
    calls = 0 if workers == 1 else (30 if stage == 3 else 3) * costs.latency
    work = costs.fixed + batch_size * costs.example + sent + calls
    return max(work, workers * batch_size / costs.feed) / (1 - costs.checkpoint)


def measure(config: ScaleBenchmark, run: TrainConfig | None = None) -> Result:
    """Measures in processes of their own; ``run`` replaces AR+ at its real size (tests do)."""
    run = replace(run or run_config(config.batch_size, precision="fp32"), zero_stage=config.zero_stage)
    b, stage = config.batch_size, config.zero_stage
    n = sum(p.numel() for p in outline(run.model, VocabularySizes()).parameters())
    half, single, two = (_measured(w, run, size, config.steps) for w, size in ((1, b // 2), (1, b), (2, b)))
    example = max((single.step - half.step) / (b - b // 2), 0.0)
    here = Costs(single.step - b * example, example, bytes_sent(0, 2, n) / two.reduce, two.latency)
    seen, predicted = b / single.step, 2 * b / step_seconds(here, stage, 2, b, n)
    seen_2 = 2 * b / two.step
    minutes = run.checkpoint_minutes or 10.0
    gpus = {w: predict(config, minutes, w, n) for w in WORKERS}
    one = config.gpu_examples_per_second
    guessed = "a guess for an H100" if one == ScaleBenchmark.gpu_examples_per_second else "as given"
    return Result(
        figures={
            "examples_per_second_1": seen,
            "examples_per_second_2": seen_2,
            "predicted_2": predicted,
            "prediction_error_2": predicted / seen_2 - 1,
            **{f"predicted_gpus_{w}": value for w, value in gpus.items()},
        },
        table=[
            ("measured here", f"{run.precision}, ZeRO {stage}, {b} examples and a thread per worker, gloo"),
            ("1 worker", f"{seen:.3g} examples/s"),
            ("2 workers", f"{seen_2:.3g} examples/s, predicted {predicted:.3g} ({predicted / seen_2:.0%})"),
            ("the model here", f"{here.fixed:.3g} s + {example:.3g} s per example, {here.bandwidth / 1e9:.2g} GB/s"),
            ("predicted for GPUs", "nothing of it is measured; it assumes"),
            ("  one GPU", f"{rate(one)} examples/s at {config.gpu_batch_size} per step, {guessed}"),
            ("  sent", f"{bytes_sent(stage, 64, n) / 1e6:.0f} MB per step by each of 64, no overlap"),
            ("  in a machine", f"{config.gpus_per_node} GPUs, {config.node_bandwidth_gb:g} GB/s"),
            ("  beyond it", f"{config.network_bandwidth_gb:g} GB/s per GPU"),
            ("  feed", f"{config.feed_cores} cores per GPU, {rate(config.feed_examples_per_second)} examples/s each"),
            ("  checkpoints", f"{CHECKPOINT_S:g} s every {minutes:g} minutes"),
            *(
                (f"  {w} GPUs", f"{rate(v)} examples/s, {v / w / gpus[1]:.0%} of {w} times one")
                for w, v in gpus.items()
            ),
        ],
    )


def predict(config: ScaleBenchmark, checkpoint_minutes: float, workers: int, parameters: int) -> float:
    """Predicted examples/s of ``workers`` GPUs; the slowest link that they need counts."""
    one_machine = workers <= config.gpus_per_node
    costs = Costs(
        fixed=0.0,
        example=1 / config.gpu_examples_per_second,
        bandwidth=1e9 * (config.node_bandwidth_gb if one_machine else config.network_bandwidth_gb),
        latency=LATENCY,
        feed=workers * config.feed_cores * config.feed_examples_per_second,
        checkpoint=CHECKPOINT_S / (60 * checkpoint_minutes + CHECKPOINT_S),
    )
    b = config.gpu_batch_size
    return workers * b / step_seconds(costs, config.zero_stage, workers, b, parameters)


@dataclass(frozen=True)
class _Measured:
    """Seconds, medians."""

    step: float
    reduce: float = 0.0
    """Of adding up all gradients over the workers."""
    latency: float = 0.0


def _measured(workers: int, run: TrainConfig, batch_size: int, steps: int) -> _Measured:
    run = replace(run, workers=workers, batch_size=workers * batch_size)
    with tempfile.TemporaryDirectory() as folder:
        return in_processes(workers, partial(_work, workers, Path(folder, "rendezvous"), run, batch_size, steps))


def in_processes(workers: int, work: Callable[[int], T]) -> T:
    """Calls ``work`` with each worker's number in a fresh process of its own; gives what the first one returns.

    The processes see no GPU: there may be one for all.
    """
    with (
        environment({"CUDA_VISIBLE_DEVICES": ""}),  # it must be so before they import torch
        ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        first, *_ = pool.map(work, range(workers))
        return first


def _work(workers: int, rendezvous: Path, run: TrainConfig, batch_size: int, steps: int, rank: int) -> _Measured:
    torch.set_num_threads(1)
    sizes = VocabularySizes()
    with process_group(rank, workers, rendezvous):
        # The same examples for every worker: the model has no word for one that waits for another.
        batches = Pool(random_examples((1 + steps) * batch_size, sizes), run.model, sizes, batch_size).random(1 + steps)
        waiting = iter(step._replace(targets=workers * step.targets) for step in batches)
        take = engine_step(run, sizes)
        step = _median(lambda: take(next(waiting)), steps)
        if workers == 1:
            return _Measured(step)
        n = sum(p.numel() for p in outline(run.model, sizes).parameters())
        gradients, one = torch.zeros(n), torch.zeros(1)
        return _Measured(
            step, _median(lambda: dist.all_reduce(gradients), steps), _median(lambda: dist.all_reduce(one), 20)
        )


def _median(function: Callable[[], object], times: int) -> float:
    function()
    return median(seconds(function) for _ in range(times))
