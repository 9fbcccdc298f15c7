"""What a run tells of its speed: means and rates of some steps, MFU, and each worker's time for its own part."""

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from arplus.config import TrainConfig, VocabularySizes
from arplus.config.gpus import peak_flops
from arplus.data.loader import Step
from arplus.model.batch import Packed
from arplus.model.cost import forward_backward_flops
from arplus.process import peak_memory_bytes
from arplus.runs.checkpoint import TrainProgress
from arplus.training.engine import StepResult, bf16_is_used


class OwnTime:
    """The time of a worker's own part of its steps: from asking for a batch until its gradients go to the others.

    So it holds waits for data and a step's arithmetic, but for the optimizer's. Where gradients are added up during
    the backward pass (ZeRO stages 2 and 3), it holds waits for the slowest worker too, and tells less. On a GPU it is
    taken from marks in its queue, which are read when all before them has been waited for.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[list[Any]] = []
        self.seconds, self.steps = 0.0, 0

    def start(self) -> None:
        """Before a batch is asked for."""
        self.marks.append([self._mark()])

    def stop(self) -> None:
        """Before gradients are added up; the last time in a step counts."""
        if self.marks:
            self.marks[-1][1:] = [self._mark()]

    def read(self) -> None:
        """Adds up the steps whose results were read."""
        for start, *stop in self.marks:
            if stop:
                self.steps += 1
                self.seconds += stop[0] - start if self.device.type == "cpu" else start.elapsed_time(stop[0]) / 1000
        self.marks.clear()

    def take(self) -> float:
        """Mean seconds per step since the last time; 0 where none was measured."""
        mean = self.seconds / max(self.steps, 1)
        self.seconds, self.steps = 0.0, 0
        return mean

    def _mark(self) -> torch.cuda.Event | float:
        if self.device.type == "cpu":
            return time.monotonic()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Tokens:
    """What one worker's batches held of real examples, whatever fills them up."""

    examples: int = 0
    context: int = 0
    persona: int = 0
    targets: int = 0

    def add(self, step: Step) -> None:
        """Counts a step's; its batches are on the CPU."""
        for batch in step.micro_batches:
            n = len(batch.example_id_B)
            self.examples += n
            self.context += _tokens(batch.context, n)
            self.persona += _tokens(batch.persona, n)
            self.targets += _tokens(batch.response, n)  # [BOS] stands for [EOS]

    def flops(self, config: TrainConfig, sizes: VocabularySizes) -> float:
        """Float operations of the training steps on them, as if all examples were of mean length."""
        n = max(self.examples, 1)
        mean = {"context": self.context / n, "persona": self.persona / n, "targets": self.targets / n}
        return self.examples * forward_backward_flops(config.model, sizes, only=config.optimizer.only, **mean)


def _tokens(packed: Packed, examples: int) -> int:
    return int(packed.sequences.offsets[examples])


@dataclass(kw_only=True)
class Meter:
    """Means and rates of the steps since the last log line."""

    total_steps: int
    config: TrainConfig
    sizes: VocabularySizes
    device: torch.device
    peak_flops: float | None = None
    """What one worker's device computes per second at best; None where that is not known."""
    results: list[StepResult] = field(default_factory=list)
    tokens: Tokens = field(default_factory=Tokens)
    waited: float = 0.0
    started: float = field(default_factory=time.monotonic)
    added: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.own = OwnTime(self.device)

    def measure(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps, with their examples and the time spent waiting for each one counted."""
        while True:
            self.own.start()
            begin = time.monotonic()
            step = next(steps, None)
            self.waited += time.monotonic() - begin
            if step is None:
                return
            if self.peak_flops is not None:
                self.tokens.add(step)
            yield step

    def add(self, results: list[StepResult]) -> float:
        """Counts the steps that were read; gives the seconds since the last time, waits for data included."""
        self.results += results
        self.own.read()
        before, self.added = self.added, time.monotonic()
        return self.added - before

    def skip_pause(self) -> None:
        """Leaves out the time since the last step, so that a validation or a save is not counted as training time."""
        now = time.monotonic()
        self.started += now - self.added
        self.added = now

    def take(self, progress: TrainProgress) -> dict[str, float]:
        """Means and rates since the last call, as MLflow names them, and starts anew; a collective call."""
        elapsed = time.monotonic() - self.started
        n = len(self.results)
        last = self.results[-1]
        rate = n / elapsed
        metrics = {
            "train/loss": sum(r.loss for r in self.results) / n,
            "train/dialogue_loss": sum(r.dialogue for r in self.results) / n,
            "train/auxiliary_loss": sum(r.auxiliary for r in self.results) / n,
            "train/grad_norm": last.grad_norm,
            "train/lr": last.lr,
            "perf/examples_per_second": rate * self.config.batch_size,
            "perf/data_wait_share": self.waited / elapsed,
            "perf/memory_gib": memory_bytes() / 2**30,
            "perf/workers": dist.get_world_size(),
            "perf/eta_seconds": (self.total_steps - progress.step) / rate,
            **self._weight(),
            **self._mfu(elapsed),
            **self._ranks(),
        }
        self.results.clear()
        self.tokens = Tokens()
        self.waited = 0.0
        self.started = time.monotonic()
        return metrics

    def _weight(self) -> dict[str, float]:
        """L_W and the mean a, where a weight is predicted."""
        losses, means = ([getattr(r, name) for r in self.results] for name in ("weight", "mean_a"))
        if losses[0] is None:
            return {}
        return {"train/weight_loss": sum(losses) / len(losses), "train/mean_a": sum(means) / len(means)}

    def _mfu(self, elapsed: float) -> dict[str, float]:
        """Model FLOPs utilisation: this worker's real arithmetic over what its device could have done."""
        if self.peak_flops is None:
            return {}
        return {"perf/mfu": self.tokens.flops(self.config, self.sizes) / elapsed / self.peak_flops}

    def _ranks(self) -> dict[str, float]:
        """Whether one worker holds up the others; a collective call."""
        if dist.get_world_size() == 1:
            return {}
        mine = torch.tensor([self.own.take()], device=self.device)
        of_all = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
        dist.all_gather(of_all, mine)
        seconds = torch.cat(of_all).tolist()
        slowest = max(seconds)
        return {
            "perf/slowest_rank": seconds.index(slowest),
            "perf/slowest_rank_seconds": slowest,
            "perf/median_rank_seconds": statistics.median_low(seconds),
        }


def peak_of(device: torch.device, precision: str) -> float | None:
    """Float operations that a worker's device computes per second at best; None for CPUs, other cards and fp32."""
    if device.type != "cuda" or not bf16_is_used(precision, device):
        return None
    return peak_flops(torch.cuda.get_device_name(device))


def memory_bytes() -> int:
    """Peak memory of this worker so far: the GPU's where there is one, else the process's resident set."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return peak_memory_bytes()
