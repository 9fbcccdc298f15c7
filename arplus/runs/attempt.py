"""Which attempt a run belongs to: the newest one, and no other may write its checkpoints.

``RUN/attempt.json`` names a job, the *owner*, and counts the starts of its workers. A job makes itself the owner when
it starts, whoever was so before: a driver that is started again is never locked out. Its rank 0 raises the number at
every start of the workers, and compares the file with its own attempt from then on. That is how an attempt that was cut
off and replaced, but lives on, notices it and stops (``StopRequests`` in :mod:`arplus.training.hooks.requests`). The
same file carries the job's word to stop.

Every change is made to the file as it was read (:meth:`arplus.documents.Document.update`), so of several at the same
moment none is lost. Nothing here waits for storage that is away: :class:`arplus.runs.folder.RunFolder` does.
"""

import logging
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

from arplus import storage
from arplus.documents import Document
from arplus.errors import INTERRUPTED, ArplusError, RunError

log = logging.getLogger(__name__)

WATCH_S = 0.5
"""Seconds between two looks at the file."""


class SupersededError(RunError):
    """Another job, or a newer start of this one, has taken the run over."""


class StoppedError(RunError):
    """The job was told to stop, and its workers did."""

    exit_code = INTERRUPTED


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The content of ``attempt.json``."""

    owner: str
    number: int
    """Starts of workers so far, over all jobs of the run."""
    mlflow_run_id: str
    stop: bool = False
    """Whether the owner was told to stop."""
    workers: tuple[str, ...] = ()
    """Of the newest start: node and log of each worker, by rank."""
    failure: dict[str, str] = field(default_factory=dict)
    """Why workers failed the last time: ``reason``, ``rank``, ``node``, ``log``, and in which ``attempt``."""

    @property
    def failed(self) -> bool:
        """Whether it is this attempt whose failure is noted; storage may have been away since an earlier one."""
        return self.failure.get("attempt") == str(self.number)

    @property
    def restarted_by_failure(self) -> bool:
        """Whether it is a failure of the attempt before that made this one."""
        return self.failure.get("attempt") == str(self.number - 1)


def read(run_uri: str) -> Attempt | None:
    """The attempt that the run belongs to; None where it has never been started."""
    return _document(run_uri).find()


def take_over(run_uri: str, mlflow_run_id: str) -> Attempt:
    """Makes a new job the owner of the run; whoever was so before stops at its next look."""
    owner = uuid4().hex

    def change(before: Attempt | None) -> Attempt:
        return Attempt(owner=owner, number=before.number if before else 0, mlflow_run_id=mlflow_run_id)

    return _document(run_uri).update(change)


def start(run_uri: str, job: Attempt, workers: Sequence[str] = ()) -> Attempt:
    """A new start of the job's workers; rank 0 calls it. Raises :class:`SupersededError` and :class:`StoppedError`."""

    def change(there: Attempt | None) -> Attempt:
        own = _check_owner(run_uri, there, job)
        if own.stop:
            raise StoppedError("stopped; the same command goes on from the newest checkpoint")
        return replace(own, number=own.number + 1, workers=tuple(workers))

    return _document(run_uri).update(change)


def note_failure(run_uri: str, job: Attempt, describe: Callable[[Sequence[str]], dict[str, str]]) -> None:
    """Notes why the job's workers failed: what ``describe`` makes of their nodes and logs."""

    def change(there: Attempt | None) -> Attempt:
        own = _check_owner(run_uri, there, job)
        return replace(own, workers=(), failure=describe(own.workers) | {"attempt": str(own.number)})

    _document(run_uri).update(change)


def request_stop(run_uri: str, job: Attempt) -> None:
    """Tells the job's workers to save and stop."""
    _document(run_uri).update(lambda there: replace(_check_owner(run_uri, there, job), stop=True))


def check(run_uri: str, mine: Attempt) -> bool:
    """Whether the owner was told to stop. Raises :class:`SupersededError` unless the run is still this attempt's."""
    there = _check_owner(run_uri, read(run_uri), mine)
    if there.number != mine.number:
        raise SupersededError(f"{run_uri}: attempt {there.number} has replaced attempt {mine.number}, which stops")
    return there.stop


class Watch:
    """Looks at the file in the background, so that a training step need not."""

    def __init__(self, run_uri: str, mine: Attempt) -> None:
        self.run_uri = run_uri
        self.mine = mine
        self.stop = False
        """Whether the owner was told to stop."""
        self.error: SupersededError | None = None
        self._closed = threading.Event()
        threading.Thread(target=self._look, name="attempt", daemon=True).start()

    def close(self) -> None:
        """Ends the looking."""
        self._closed.set()

    def _look(self) -> None:
        while not self._closed.wait(WATCH_S):
            try:
                self.stop = check(self.run_uri, self.mine)
            except SupersededError as error:
                self.error = error
                return
            except (ArplusError, OSError) as error:  # the storage is away for a moment
                log.debug("%s", error)


@contextmanager
def on_stop_signal(act: Callable[[], None], told: threading.Event | None = None) -> Iterator[None]:
    """Calls ``act`` once when ``told`` is set or this process is told to end, by ``ray job stop`` or Ctrl-C.

    A second signal ends it. ``ray job stop`` kills three seconds later (``RAY_JOB_STOP_WAIT_TIME_S``, set where the
    head node starts). A small model is saved by then; what is not costs the steps since the last checkpoint, and
    nothing else. Only a process's main thread hears signals; elsewhere (in a trial of Ray Tune) ``told`` alone counts.
    """
    told, over = told or threading.Event(), threading.Event()
    in_main = threading.current_thread() is threading.main_thread()

    def wait() -> None:
        told.wait()
        if not over.is_set():
            log.info("told to end: saving a checkpoint first")
            act()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def handle(*_: object) -> None:
        restore()
        told.set()

    # Not in the handler itself, which may interrupt the main thread anywhere.
    threading.Thread(target=wait, name="stop signal", daemon=True).start()
    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT) if in_main}
    try:
        yield
    finally:
        restore()
        over.set()
        told.set()


def _check_owner(run_uri: str, there: Attempt | None, mine: Attempt) -> Attempt:
    if there is None:
        raise SupersededError(f"{run_uri}: its attempt.json is gone; whoever deletes a run's folder ends the run")
    if there.owner != mine.owner:
        raise SupersededError(f"{run_uri}: another job has taken this run over, and goes on with it; this one stops")
    return there


def _document(run_uri: str) -> Document[Attempt]:
    return Document(storage.join(run_uri, "attempt.json"), Attempt, patient=False)
