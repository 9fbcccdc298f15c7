"""The log lines and the progress bar."""

import logging
from typing import Any

from arplus.data.loader import Step
from arplus.runs.checkpoint import TrainProgress
from arplus.training.hooks.base import Hook

log = logging.getLogger(__name__)

PARTED = 1.2
"""How many times the median worker's time the slowest one's is, when the log line says so."""


class Console(Hook):
    """A line per log step and validation; rank 0's."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps

    def on_log(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Says where the run is."""
        log.info(describe(progress, metrics, self.total_steps))

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Says what the validation found."""
        log.info(
            "validation at step %d: response PPL %.3f%s, L_LM %.4f, %d examples",
            progress.step,
            metrics["response_ppl"],
            "" if progress.validations_since_best else " (best)",
            metrics["auxiliary_loss"],
            metrics["examples"],
        )


class ProgressBar(Hook):
    """The bar at the foot of the driver's terminal; rank 0's."""

    def __init__(self, bar: Any, total_steps: int) -> None:
        self.bar = bar
        self.bar.total = total_steps

    def after_step(self, progress: TrainProgress, step: Step) -> None:
        """Moves the bar, which tells the driver once per second."""
        self.bar.update(progress.step + 1 - self.bar.n)

    def close(self) -> None:
        """Ends the bar."""
        self.bar.close()


def describe(progress: TrainProgress, metrics: dict[str, float], total_steps: int) -> str:
    """One log line of a training step."""
    m = metrics
    parts = [
        f"step {progress.step}/{total_steps} epoch {progress.epoch + 1}",
        f"loss {m['train/loss']:.4f} (L_D {m['train/dialogue_loss']:.4f}, L_LM {m['train/auxiliary_loss']:.4f})",
        f"lr {m['train/lr']:.2e}",
        f"norm {m['train/grad_norm']:.3f}",
        f"{m['perf/examples_per_second']:.0f} examples/s",
        f"data wait {m['perf/data_wait_share']:.1%}",
    ]
    if "train/weight_loss" in m:
        parts[1] += f" (L_W {m['train/weight_loss']:.4f}, mean a {m['train/mean_a']:.3f})"
    if "perf/mfu" in m:
        parts += [f"MFU {m['perf/mfu']:.1%}"]
    slowest, median = m.get("perf/slowest_rank_seconds", 0.0), m.get("perf/median_rank_seconds", 0.0)
    if slowest > PARTED * median:
        parts += [f"worker {m['perf/slowest_rank']:.0f} slow ({slowest:.3f} s per step, median {median:.3f} s)"]
    return " | ".join([*parts, f"{m['perf/memory_gib']:.2f} GiB", f"ETA {_clock(m['perf/eta_seconds'])}"])


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
