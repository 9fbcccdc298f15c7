"""What the processes of ``test_hang.py`` run: a training loop in which worker 1 is slow, and then does not come."""

import time
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist

from arplus import torch_private
from arplus.data.loader import RankLoader, Step
from arplus.runs.checkpoint import TrainProgress
from arplus.training.group import HangError
from arplus.training.hooks import Hook
from helpers.engine_worker import SIZES, config, engine_steps, initial_model

SLOW_S, TIMEOUT_S = 0.3, 3.0


class Recorder(Hook):
    """Keeps the newest metrics."""

    def on_log(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        self.metrics = metrics


def slow_then_gone(slow_steps: int) -> tuple[dict[str, float], str]:
    """Metrics of the steps for which worker 1 was slow, and what is said when it does not come to the next one."""
    from arplus.training.engine import Engine
    from arplus.training.loop import fit

    c = config(workers=2, epochs=1, log_every=slow_steps, collective_timeout_minutes=TIMEOUT_S / 60)
    engine = Engine(initial_model(c), c, torch.device("cpu"))
    made = engine_steps(c, 0, slow_steps + 1)

    def batches(epoch: int, first: int = 0, last: int | None = None) -> Iterator[Step]:
        for number, step in enumerate(made):
            if dist.get_rank() == 1:
                time.sleep(2 * TIMEOUT_S if number == slow_steps else SLOW_S)
            yield step

    sampler = SimpleNamespace(batch_size=8, split=SimpleNamespace(examples=8 * len(made)))
    maker = SimpleNamespace(spec=SimpleNamespace(sizes=SIZES))
    train = SimpleNamespace(steps=len(made), batches=batches, sampler=sampler, maker=maker)
    valid = SimpleNamespace(sampler=SimpleNamespace(split=SimpleNamespace(examples=0)))
    hook, said = Recorder(), ""
    dist.barrier()
    torch_private.set_timeout(timedelta(seconds=TIMEOUT_S), cast(Any, dist.group.WORLD))
    try:
        fit(engine, cast(RankLoader, train), cast(RankLoader, valid), TrainProgress(fingerprint=""), c, [hook])
    except HangError as error:
        said = str(error)
    except RuntimeError:
        assert dist.get_rank() == 1, "it finds worker 0 gone"
    return hook.metrics, said
