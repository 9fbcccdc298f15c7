"""The machine that is measured: what it is, how fast it multiplies, how much time and memory a job takes on it."""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Self

import psutil
import ray
import torch

from arplus.cluster import ray_private

SIDE = 1024
_INTERVAL_S = 0.5


def describe() -> dict[str, Any]:
    """Cores, memory, versions, load, and the rate of a 1024-wide fp32 matrix product, measured now."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "ray", "pyarrow", "numpy")},
        "load": round(os.getloadavg()[0], 1),
        "matmul_gflops": round(matmul_gflops(), 1),
    }


def matmul_gflops(rounds: int = 15) -> float:
    """GFLOP/s of a 1024-wide fp32 matrix product on the CPU, median of the rounds: a yardstick between machines."""
    a, b = torch.ones(SIDE, SIDE), torch.ones(SIDE, SIDE)
    return 2 * SIDE**3 / median(seconds(lambda: torch.mm(a, b)) for _ in range(rounds)) / 1e9


def seconds(function: Callable[[], object]) -> float:
    """Seconds that a call takes, with what it leaves running on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(sides: Mapping[str, Callable[[], object]], rounds: int) -> tuple[dict[str, list[float]], float]:
    """Seconds of each side in each round, and the machine's GFLOP/s meanwhile.

    The sides take turns, so that a machine that slows down slows them all.
    """
    times: dict[str, list[float]] = {name: [] for name in sides}
    gflops = []
    for _ in range(rounds):
        gflops.append(matmul_gflops())
        for name, turn in sides.items():
            times[name].append(seconds(turn))
    return times, median(gflops)


def processes() -> list[psutil.Process]:
    """The process itself and those of its Ray cluster that run on this machine."""
    roots = [psutil.Process()]
    if ray.is_initialized() and (logs := ray_private.logs_folder()):
        # A cluster that was there before us is not among our children; its processes name its session's folder.
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if logs.parent.name in " ".join(process.cmdline()):
                    roots.append(process)
    found = {root.pid: root for root in roots}
    for root in roots:
        with contextlib.suppress(psutil.Error):
            found |= {child.pid: child for child in root.children(recursive=True)}
    return list(found.values())


def memory_bytes() -> int:
    """Memory of :func:`processes` now: the sum of their PSS, which has every page of the object store once."""
    total = 0
    for process in processes():
        with contextlib.suppress(psutil.Error):
            total += process.memory_full_info().pss
    return total


class Usage:
    """CPU time of :func:`processes` while it is entered, and where wanted the peak of their memory."""

    def __init__(self, *, memory: bool) -> None:
        self.memory = memory
        self.seconds = 0.0
        """Wall time."""
        self.cpu_seconds = 0.0
        """CPU time of the processes that are alive at the end."""
        self.peak_memory_bytes = 0
        """Peak of :func:`memory_bytes`, looked at twice per second."""

    def __enter__(self) -> Self:
        self._before = dict(_cpu_seconds())
        self._over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="memory", daemon=True)
        if self.memory:
            self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = sum(used - self._before.get(pid, 0.0) for pid, used in _cpu_seconds())
        self._over.set()
        if self.memory:
            self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory_bytes())
            if self._over.wait(_INTERVAL_S):
                return


def _cpu_seconds() -> Iterator[tuple[int, float]]:
    for process in processes():
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            yield process.pid, times.user + times.system


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()
