"""The machine that is measured: what it is, how fast it multiplies, how much memory and CPU time a job takes on it."""

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Self

import psutil
import ray
import torch

from arplus.config.gpus import peak_flops

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
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        torch.mm(a, b)
        seconds.append(time.perf_counter() - start)
    return 2 * SIDE**3 / median(seconds) / 1e9


def processes() -> list[psutil.Process]:
    """The process itself and those of its Ray cluster that run on this machine."""
    roots = [psutil.Process()]
    if ray.is_initialized():
        # A cluster that was there before us is not among our children; its processes name its session's folder.
        node: Any = ray._private.worker._global_node
        session = Path(node.get_session_dir_path()).name
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if session in " ".join(process.cmdline()):
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
        with contextlib.suppress(psutil.Error, OSError):
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += sum(int(line.split()[1]) << 10 for line in rollup.splitlines() if line.startswith("Pss:"))
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
        """Peak of :func:`memory_bytes`, looked at twice a second."""

    def __enter__(self) -> Self:
        self._before = dict(_cpu_seconds())
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample, name="memory", daemon=True)
        if self.memory:
            self._sampler.start()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.cpu_seconds = sum(seconds - self._before.get(pid, 0.0) for pid, seconds in _cpu_seconds())
        self._stopped.set()
        if self.memory:
            self._sampler.join()

    def _sample(self) -> None:
        while True:
            self.peak_memory_bytes = max(self.peak_memory_bytes, memory_bytes())
            if self._stopped.wait(_INTERVAL_S):
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


def peak_bf16_flops() -> float | None:
    """Float operations per second that the GPU could do at best in bf16; None without a GPU, or for one not known."""
    return peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else None
