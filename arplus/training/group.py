"""The process group: how long a collective may wait, who did not come to one, and a group without Ray Train."""

import contextlib
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist

from arplus import torch_private
from arplus.errors import RunError
from arplus.process import environment

log = logging.getLogger(__name__)

STALLED = 0.8
"""The share of the timeout after which a worker that comes nowhere says who is missing."""
NOTES = 20
"""Notes that a worker takes within a timeout."""


class HangError(RunError):
    """Workers waited for another one longer than the process group's timeout."""


class Note(NamedTuple):
    """Where a worker is."""

    passed: int
    """Places that it has come by."""
    host: str
    place: str


class RollCall:
    """Notes where each worker is, so that the error of a collective that times out names who did not come.

    All workers come by the same places in the same order (:meth:`at`). A thread writes the newest one to the group's
    store now and then, so that it costs a step nothing. gloo raises when it has waited too long, and out of that comes
    a :class:`HangError`. NCCL ends the process from within, so a worker that stands still warns shortly before.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self.rank, self.workers = dist.get_rank(), dist.get_world_size()
        self.store = torch_private.default_store()
        self.here = Note(0, socket.gethostname(), "starts")
        self.closed = threading.Event()

    def at(self, place: str) -> None:
        """Notes that this worker has come to a place, such as "computes step 3"."""
        self.here = Note(self.here.passed + 1, self.here.host, place)

    def notes(self) -> list[Note]:
        """Where every worker is, as far as is known."""
        self._write()
        return [self._read(rank) for rank in range(self.workers)]

    def missing(self, notes: list[Note]) -> str:
        """Who is behind the others, and where."""
        furthest = max(notes)
        behind = [
            f"worker {rank} on {note.host} {note.place}"
            for rank, note in enumerate(notes)
            if note.passed < furthest.passed
        ]
        if not behind:
            return f"none is behind the others, each worker {furthest.place}"
        return f"{'; '.join(behind)}, while the others wait (worker {notes.index(furthest)} {furthest.place})"

    def __enter__(self) -> Self:
        if self.workers > 1:
            threading.Thread(target=self._follow, name="roll call", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self.closed.set()
        # A timeout has no type of its own in torch 2.13, on gloo.
        if isinstance(error, RuntimeError) and "timed out" in str(error).lower():
            with contextlib.suppress(dist.DistError):  # the store went with its worker
                raise HangError(f"no answer for {self._minutes}: {self.missing(self.notes())}") from error

    @property
    def _minutes(self) -> str:
        return f"{self.timeout / timedelta(minutes=1):.3g} minutes (--collective-timeout-minutes)"

    def _follow(self) -> None:
        seen, since = self.here, time.monotonic()
        with contextlib.suppress(dist.DistError):  # the store went with its worker
            while not self.closed.wait(self.timeout.total_seconds() / NOTES):
                self._write()
                if self.here is not seen:
                    seen, since = self.here, time.monotonic()
                elif time.monotonic() - since > STALLED * self.timeout.total_seconds():
                    since = time.monotonic()
                    notes = self.notes()
                    if self.rank == notes.index(max(notes)):
                        log.warning("the workers stand still and wait %s: %s", self._minutes, self.missing(notes))

    def _write(self) -> None:
        self.store.set(f"arplus/at/{self.rank}", "\n".join(map(str, self.here)))

    def _read(self, rank: int) -> Note:
        key = f"arplus/at/{rank}"
        if not self.store.check([key]):
            return Note(-1, "an unknown host", "has not started")
        count, host, place = self.store.get(key).decode().split("\n")
        return Note(int(count), host, place)


@contextmanager
def process_group(rank: int = 0, workers: int = 1, rendezvous: Path | None = None) -> Iterator[None]:
    """Makes this process worker ``rank`` of ``workers``, which meet at the file ``rendezvous``; one alone needs none.

    For whoever trains without Ray Train, which has its own: benchmarks and tests.
    At the end it is of no group any more, in DeepSpeed's eyes too.
    """
    variables = {"RANK": str(rank), "WORLD_SIZE": str(workers), "LOCAL_RANK": str(rank)}  # DeepSpeed looks for them
    meeting: dict[str, Any] = {"store": dist.HashStore()}
    if rendezvous is not None:
        meeting = {"init_method": rendezvous.absolute().as_uri()}
    with environment(variables):
        dist.init_process_group(
            "nccl" if torch.cuda.is_available() else "gloo", rank=rank, world_size=workers, **meeting
        )
        try:
            yield
        finally:
            _end()


def _end() -> None:
    if "deepspeed" in sys.modules:
        from arplus.training import deepspeed_private  # seconds, for whoever made no engine

        deepspeed_private.end_groups()
    else:
        dist.destroy_process_group()
