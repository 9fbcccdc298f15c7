"""How fast AR+ trains on this machine, beside the paper's code and a Hugging Face BART.

Batches are random ones, as training draws them. Every round has batches of its own, which all sides take in turns: we
packed, the others padded to the longest row. So no side has seen a batch's shapes before, as in training. A round also
times a 1024-wide matrix product, the yardstick between machines.
"""

import contextlib
import functools
import logging
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import islice
from statistics import median
from typing import Any, Literal

import torch

from arplus.benchmark.baselines.bart import Bart
from arplus.benchmark.baselines.padded import Padded
from arplus.benchmark.baselines.paper_code import PaperARPlus, mean_losses
from arplus.benchmark.figures import NOT_INSTALLED, Result, rate, size
from arplus.benchmark.options import TrainBenchmark
from arplus.benchmark.pool import Pool, mean_lengths, padding, pool_of
from arplus.benchmark.usage import interleaved
from arplus.cluster import node
from arplus.config import OptimizerConfig, TrainConfig, VocabularySizes
from arplus.data.capacity import Filler
from arplus.data.loader import Step
from arplus.kernels.gpu import leave_cudnn_out
from arplus.model.cost import forward_backward_flops
from arplus.model.network import PersonaTransformer
from arplus.training.engine import Engine, is_compiled
from arplus.training.group import process_group
from arplus.training.loop import seed_dropout
from arplus.training.meter import memory_bytes, peak_of

log = logging.getLogger(__name__)

MEMORY_STEPS = 4
"""Most steps of a process whose peak memory is read."""
Side = Literal["ours", "paper", "bart"]
SIDES: tuple[Side, ...] = ("ours", "paper", "bart")
TrainStep = Callable[[Any], None]
"""One optimizer step on one of the side's :func:`inputs`: forward, backward, clipping, AdamW."""


def measure(config: TrainBenchmark, run: TrainConfig | None = None) -> Result:
    """Measures in this process; ``run`` replaces AR+ at its real size (tests do)."""
    run = run or run_config(config.batch_size, precision=config.precision, compile=config.compile)
    if run.precision == "bf16" and not torch.cuda.is_available() and not node.has_bf16():
        log.warning(node.SLOW_BF16)
    warm_up = 3 if torch.cuda.is_available() else 1  # a GPU's step is compiled, perhaps recorded
    count = warm_up + config.rounds * config.batches
    pool = pool_of(config, run.model, count * config.batch_size)
    steps, sizes = pool.random(count), pool.sizes
    turns: dict[str, Callable[[], None]] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with process_group():
        for side in SIDES if config.compare else SIDES[:1]:
            with contextlib.suppress(ImportError):
                take, waiting = train_step(side, run, sizes), iter(inputs(side, steps, run, pool))
                _take(take, waiting, warm_up)
                turns[side] = functools.partial(_take, take, waiting, config.batches)
        times, gflops = interleaved(turns, config.rounds)
    if torch.cuda.is_available() and not config.compare:  # nothing but ours was in its memory
        memory = {"ours": memory_bytes()}
    else:
        memory = {
            side: peak_memory(side, run, sizes, inputs(side, steps[:MEMORY_STEPS], run, pool))
            for side in SIDES[:2]
            if side in turns
        }
    per_batch = {side: [t / config.batches for t in found] for side, found in times.items()}
    return _result(config, run, sizes, steps, per_batch, gflops, memory)


def _take(step: TrainStep, waiting: Iterator[Any], count: int) -> None:
    for batch in islice(waiting, count):
        step(batch)


def _result(
    config: TrainBenchmark,
    run: TrainConfig,
    sizes: VocabularySizes,
    steps: list[Step],
    times: dict[str, list[float]],
    gflops: float,
    memory: dict[str, int],
) -> Result:
    ours = median(times["ours"])
    ratios = {side: median(t / o for t, o in zip(times[side], times["ours"], strict=True)) for side in times}
    examples_per_second = config.batch_size / ours
    batches = [batch for step in steps for batch in step.micro_batches]
    lengths = mean_lengths(batches)
    flops = forward_backward_flops(run.model, sizes, context=lengths[0], targets=lengths[1], persona=lengths[2])
    peak = peak_of(device(), run.precision)
    mfu = flops * examples_per_second / peak if peak else None

    def speed(side: str) -> str:
        if side not in times:
            return NOT_INSTALLED if config.compare else "left out"
        found = times[side]
        return (
            f"{rate(config.batch_size / median(found))} examples/s, {median(found):.3g} s per batch "
            f"({min(found):.3g} to {max(found):.3g} in {len(found)} rounds)"
        )

    return Result(
        figures={
            "examples_per_second": examples_per_second,
            "examples_per_second_least": config.batch_size / max(times["ours"]),
            "ratio_paper": ratios.get("paper"),
            "ratio_bart": ratios.get("bart"),
            "gflop_equivalents_per_example": ours * gflops / config.batch_size,
            "peak_memory_bytes": memory["ours"],
            "peak_memory_ratio_paper": memory["ours"] / memory["paper"] if config.compare else None,
            "mfu": mfu,
        },
        table=[
            ("step", f"{run.precision}, batch {config.batch_size}, {torch.get_num_threads()} threads"),
            ("our step", "compiled" if is_compiled(run, device()) else "not compiled"),
            ("lengths", "{:.1f} context characters, {:.1f} targets, {:.1f} persona words".format(*lengths)),
            ("padding", f"none of ours; {padding(batches):.1%} of the others' contexts"),
            ("best algorithm", f"{flops / 1e9:.1f} GFLOP per example"),
            ("ours", speed("ours")),
            ("paper's code", speed("paper")),
            ("Hugging Face BART", speed("bart")),
            *((f"ratio {side}", f"{ratio:.2f}") for side, ratio in ratios.items() if side != "ours"),
            ("GFLOP-equivalents per example", f"{ours * gflops / config.batch_size:.2f} at {gflops:.0f} GFLOP/s"),
            ("peak memory", ", ".join(f"{side} {size(value)}" for side, value in memory.items())),
            ("MFU", f"{mfu:.1%}" if mfu else "none: no known GPU, or not in bf16"),
        ],
    )


def run_config(batch_size: int, **settings: Any) -> TrainConfig:
    """AR+ at its real size, one worker; a rate so low that random examples do not diverge."""
    return replace(TrainConfig(), batch_size=batch_size, optimizer=OptimizerConfig(lr=1e-5, min_lr=1e-5), **settings)


def device() -> torch.device:
    """Where the steps run."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def inputs(side: Side, steps: list[Step], run: TrainConfig, pool: Pool) -> list[Any]:
    """The same batches of a pool as a side takes them: packed for us, padded to their longest for the others."""
    if side != "ours":
        return [Padded.of(step.micro_batches[0], pool.sizes) for step in steps]
    if not is_compiled(run, device()):
        return list(steps)
    filled = Filler(pool.rules, run.batch_size)([batch for step in steps for batch in step.micro_batches])
    return [Step([batch], step.targets) for batch, step in zip(filled, steps, strict=True)]


def train_step(side: Side, run: TrainConfig, sizes: VocabularySizes) -> TrainStep:
    """The step of a fresh model of one side; the others train in fp32 with torch's AdamW as it comes.

    Raises ImportError for BART without ``transformers``.
    """
    leave_cudnn_out()
    torch.manual_seed(0)
    if side == "ours":
        return engine_step(run, sizes)
    model = (PaperARPlus(run.model, sizes) if side == "paper" else Bart(run.model, sizes)).to(device()).train()
    parameters, settings = list(model.parameters()), run.optimizer
    optimizer = torch.optim.AdamW(parameters, lr=settings.lr, eps=settings.eps, weight_decay=settings.weight_decay)

    def take(batch: Padded) -> None:
        optimizer.zero_grad()
        batch = batch.to(device())
        dialogue, auxiliary = mean_losses(model, batch) if isinstance(model, PaperARPlus) else (model(batch), 0.0)
        (dialogue + run.objective.lambda1 * auxiliary).backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
        optimizer.step()

    return take


def engine_step(run: TrainConfig, sizes: VocabularySizes) -> TrainStep:
    """Our step, through the engine that training uses, in a process group (:mod:`arplus.training.group`)."""
    engine = Engine(PersonaTransformer(run.model, sizes), run, device())
    steps = 0

    def take(step: Step) -> None:
        nonlocal steps
        seed_dropout(run.seed, steps)
        engine.train_step(step)
        if engine.wants_reading:
            engine.read()
        steps += 1

    return take


def peak_memory(side: Side, run: TrainConfig, sizes: VocabularySizes, waiting: list[Any]) -> int:
    """Peak bytes of a process that takes these inputs and does nothing else: resident, on a GPU allocated there."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_memory, side, run, sizes, waiting, torch.get_num_threads()).result()


def _peak_memory(side: Side, run: TrainConfig, sizes: VocabularySizes, waiting: list[Any], threads: int) -> int:
    torch.set_num_threads(threads)
    with process_group():
        take = train_step(side, run, sizes)
        for batch in waiting:
            take(batch)
    return memory_bytes()
