"""Measures several subjects one after another in one process: ``measure.py [--small] [--lock FILE] LINES SUBJECT…``.

A subject is ``train:512`` or ``generate:512``, what ``jobs/benchmark.py`` of that name measures at a batch of 512;
``large:256``, the same of arplus-large; or ``profile:512``, the dearest kernels of a step. ``:off`` at its end leaves
the step uncompiled. Each adds a line of JSON to the file LINES, and one that fails a line with its error. What the file
has figures of is left out, and what failed comes last, so that the same command goes on after a crash. With ``--lock``
all but the timing may run beside other processes.
"""

import argparse
import fcntl
import gc
import json
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from arplus.benchmark import reply_speed, step_speed
from arplus.benchmark.options import GenerateBenchmark, TrainBenchmark
from arplus.benchmark.pool import Pool, random_examples
from arplus.config import ModelConfig, TrainConfig, VocabularySizes, preset
from arplus.training.group import process_group

SMALL = ModelConfig(layers=2, repeats=2, d_model=32, embedding_size=16, heads=2, ff_size=48, ff_bottleneck=8)
"""The network of a rehearsal."""
PROFILED, KERNELS = 3, 15
"""Steps of a profile, and the kernels that it names."""
Figures = dict[str, Any]


def run_of(size: int, compiled: str, model: ModelConfig) -> TrainConfig:
    """A run of one worker with this network."""
    return replace(step_speed.run_config(size, compile=compiled), model=model)


def train(size: int, compiled: str, model: ModelConfig) -> Figures:
    """Examples per second of the training step."""
    settings = TrainBenchmark(batch_size=size, compare=False, rounds=3)
    return dict(step_speed.measure(settings, run_of(size, compiled, model)).figures)


def generate(size: int, compiled: str, model: ModelConfig) -> Figures:
    """Replies per second."""
    settings = GenerateBenchmark(batch_size=size, compare=False, batches=4)
    return dict(reply_speed.measure(settings, model).figures)


def profile_step(size: int, compiled: str, model: ModelConfig) -> Figures:
    """Where the time of a step goes: how long the GPU computes in it, in how many kernels, and the dearest of them."""
    run, sizes, on_gpu = run_of(size, compiled, model), VocabularySizes(), torch.cuda.is_available()
    pool = Pool(random_examples(2 * PROFILED * size, sizes), model, sizes, size)
    steps = pool.random(2 * PROFILED)
    with process_group():
        take, inputs = step_speed.train_step("ours", run, sizes), step_speed.inputs("ours", steps, run, pool)
        for step in inputs[:PROFILED]:
            take(step)
        activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
        began = time.perf_counter()
        with profile(activities=activities) as found:
            for step in inputs[PROFILED:]:
                take(step)
            if on_gpu:
                torch.cuda.synchronize()
        seconds = (time.perf_counter() - began) / PROFILED
    events = found.key_averages()
    cost = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    # An operation's device time is that of its kernels, which are events of their own.
    kernels = [e for e in events if not on_gpu or e.device_type != torch.autograd.DeviceType.CPU]
    kernels.sort(key=lambda event: getattr(event, cost), reverse=True)
    return {
        "seconds_with_profiler": seconds,
        "busy_seconds": sum(getattr(event, cost) for event in kernels) / 1e6 / PROFILED,
        "kernels": sum(event.count for event in kernels) / PROFILED,
        "dearest": [(e.key[:100], e.count / PROFILED, getattr(e, cost) / 1e6 / PROFILED) for e in kernels[:KERNELS]],
    }


SUBJECTS: dict[str, Callable[[int, str, ModelConfig], Figures]] = {
    "train": train,
    "large": train,
    "generate": generate,
    "profile": profile_step,
}


def measure(subject: str, small: bool) -> Figures:
    """The figures of a subject by its name."""
    kind, size, *compiled = subject.split(":")
    model = preset("arplus-large" if kind == "large" else "arplus").model
    return SUBJECTS[kind](int(size), *compiled or ["auto"], SMALL if small else model)


def in_turn(lock: str) -> None:
    """Has the benchmark of the training step begin to time when no other process holds the lock."""
    time_them = step_speed.interleaved

    def alone(sides: Mapping[str, Callable[[], object]], rounds: int) -> tuple[dict[str, list[float]], float]:
        with open(lock, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            return time_them(sides, rounds)

    step_speed.interleaved = alone


def main() -> int:
    """Measures; 1 where a subject failed in a way that leaves this process without its GPU."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--small", action="store_true", help="a tiny network, for a rehearsal")
    parser.add_argument("--lock", help="the file whose lock whoever times holds")
    parser.add_argument("lines", type=Path, help="the file that gets the lines")
    parser.add_argument("subjects", nargs="+")
    asked = parser.parse_args()
    if asked.lock:
        in_turn(asked.lock)
    lines = map(json.loads, asked.lines.read_text().splitlines() if asked.lines.exists() else [])
    before = {line["subject"]: "error" in line for line in lines}
    for subject in sorted((s for s in asked.subjects if before.get(s, True)), key=before.__contains__):
        began = time.perf_counter()
        try:
            found = measure(subject, asked.small)
        except Exception as error:
            traceback.print_exc()
            found = {"error": f"{type(error).__name__}: {error}"[:500]}
        line = {"subject": subject, **found, "took_seconds": round(time.perf_counter() - began, 1)}
        with asked.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        if "CUDA error" in line.get("error", ""):
            return 1
        torch.compiler.reset()
        gc.collect()
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
