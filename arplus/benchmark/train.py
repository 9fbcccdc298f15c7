"""The train step: examples per second against the paper's code and a Hugging Face BART, interleaved in one run.

Batches are random ones, as training draws them. Every round has batches of its own, which all sides take in turns: we
packed, the others padded to the longest row. So no side has seen a batch's shapes before, as in training. A round also
times a 1024-wide matrix product, the yardstick between machines. A machine that slows down meanwhile slows them all.
"""

import contextlib
import functools
import logging
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from statistics import median
from typing import Any, TypeVar

import torch

from arplus.benchmark import sides
from arplus.benchmark.machine import matmul_gflops, peak_bf16_flops
from arplus.benchmark.pool import Pool, mean_lengths, padding
from arplus.benchmark.report import NOT_INSTALLED, Result, rate, size
from arplus.benchmark.settings import TrainBenchmark
from arplus.benchmark.sides import Side
from arplus.cluster import node
from arplus.config import TrainConfig, VocabularySizes
from arplus.data.loader import Step
from arplus.model.cost import forward_backward_flops
from arplus.process import peak_memory_bytes
from arplus.training.engine import is_compiled
from arplus.training.group import process_group

log = logging.getLogger(__name__)

T = TypeVar("T")

MEMORY_STEPS = 4
"""Most steps of a process whose peak memory is read."""


def measure(config: TrainBenchmark, run: TrainConfig | None = None) -> Result:
    """Measures in this process; ``run`` replaces AR+ at its real size (tests do)."""
    run = run or sides.run_config(config.precision, config.zero_stage, config.batch_size, compiled=config.compile)
    if run.precision == "bf16" and not torch.cuda.is_available() and not node.has_bf16():
        log.warning(node.SLOW_BF16)
    sizes = VocabularySizes()
    warm_up = 3 if torch.cuda.is_available() else 1  # a GPU's step is compiled, perhaps recorded
    count = warm_up + config.rounds * config.batches
    steps = Pool.of(config, run.model, sizes, count * config.batch_size).random(count)
    with process_group():
        taken: dict[Side, sides.TrainStep] = {"ours": sides.train_step("ours", run, sizes)}
        if config.compare:
            taken["plain"] = sides.train_step("plain", run, sizes)
            with contextlib.suppress(ImportError):
                taken["bart"] = sides.train_step("bart", run, sizes)
        inputs = {side: sides.inputs(side, steps, run, sizes) for side in taken}
        times = _times(taken, inputs, warm_up, config.batches)
    gflops = median(times.pop("matmul"))
    compared: tuple[Side, ...] = ("ours", "plain") if config.compare else ("ours",)
    memory = {side: peak_memory(side, run, sizes, steps[:MEMORY_STEPS]) for side in compared}

    ours = median(times["ours"])
    ratios = {side: median(t / o for t, o in zip(times[side], times["ours"], strict=True)) for side in times}
    examples_per_second = config.batch_size / ours
    batches = [batch for step in steps for batch in step.micro_batches]
    lengths = mean_lengths(batches)
    flops = forward_backward_flops(run.model, sizes, context=lengths[0], targets=lengths[1], persona=lengths[2])
    peak, zero = peak_bf16_flops(), run.zero_stage_of(1)
    figures: dict[str, float | None] = {
        "examples_per_second": examples_per_second,
        "examples_per_second_least": config.batch_size / max(times["ours"]),
        "ratio_plain": ratios.get("plain"),
        "ratio_bart": ratios.get("bart"),
        "gflop_equivalents_per_example": ours * gflops / config.batch_size,
        "peak_memory_bytes": memory["ours"],
        "peak_memory_ratio_plain": memory["ours"] / memory["plain"] if config.compare else None,
        "mfu": flops * examples_per_second / peak if peak else None,
    }
    return Result(
        figures=figures,
        table=[
            ("step", f"{run.precision}, ZeRO {zero}, batch {config.batch_size}, {torch.get_num_threads()} threads"),
            ("our step", "compiled" if is_compiled(run, sides.device()) else "not compiled"),
            ("lengths", "{:.1f} context characters, {:.1f} targets, {:.1f} persona words".format(*lengths)),
            ("padding", f"none of ours; {padding(batches):.1%} of the others' contexts"),
            ("best algorithm", f"{flops / 1e9:.1f} GFLOP per example"),
            ("ours", _seconds(times["ours"], config.batch_size)),
            ("paper's code", _compared(times.get("plain"), config, "left out")),
            ("Hugging Face BART", _compared(times.get("bart"), config, NOT_INSTALLED)),
            *((f"ratio {side}", f"{ratio:.2f}") for side, ratio in ratios.items() if side != "ours"),
            ("GFLOP-equivalents per example", f"{ours * gflops / config.batch_size:.2f} at {gflops:.0f} GFLOP/s"),
            ("peak memory", ", ".join(f"{side} {size(value)}" for side, value in memory.items())),
            ("MFU", f"{figures['mfu']:.1%}" if peak else "none: no known GPU"),
        ],
    )


def _times(
    taken: dict[Side, sides.TrainStep], inputs: dict[Side, list[Any]], warm_up: int, batches: int
) -> dict[str, list[float]]:
    """Seconds per batch of every round, and of the matrix product; so many steps to warm up are not counted."""
    for side, take in taken.items():
        for batch in inputs[side][:warm_up]:
            take(batch)
    times: dict[str, list[float]] = {name: [] for name in (*taken, "matmul")}
    for first in range(warm_up, len(inputs["ours"]), batches):
        times["matmul"].append(matmul_gflops())
        for side, take in taken.items():
            times[side].append(timed(take, inputs[side][first : first + batches]) / batches)
    return times


def timed(function: Callable[[T], object], items: Iterable[T]) -> float:
    """Seconds that calls with all the items take, with what they leave running on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for item in items:
        function(item)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(side: Side, run: TrainConfig, sizes: VocabularySizes, steps: list[Step]) -> int:
    """Peak bytes of a process that trains these steps and does nothing else: resident, on a GPU allocated there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(functools.partial(_peak, side, run, sizes, steps, torch.get_num_threads())).result()


def _peak(side: Side, run: TrainConfig, sizes: VocabularySizes, steps: list[Step], threads: int) -> int:
    torch.set_num_threads(threads)
    with process_group():
        take = sides.train_step(side, run, sizes)
        for batch in sides.inputs(side, steps, run, sizes):
            take(batch)
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()


def _seconds(times: list[float], batch_size: int) -> str:
    return (
        f"{rate(batch_size / median(times))} examples/s, {median(times):.3g} s per batch "
        f"({min(times):.3g} to {max(times):.3g} in {len(times)} rounds)"
    )


def _compared(times: list[float] | None, config: TrainBenchmark, otherwise: str) -> str:
    if times is None:
        return otherwise if config.compare else "left out"
    return _seconds(times, config.batch_size)
