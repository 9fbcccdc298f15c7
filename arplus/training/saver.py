"""Checkpoints off the training path: serialised, hashed and written by a background thread of rank 0."""

import threading
from collections.abc import Callable

from arplus import storage
from arplus.runs import checkpoint, retention
from arplus.runs.checkpoint import TrainState
from arplus.runs.retention import Keep


class Saver:
    """Writes train states, one at a time; an error stays in :attr:`error` and no further one is written."""

    def __init__(self, run_uri: str, *, attempt: int, keep: Keep, check: Callable[[], object]) -> None:
        """``check`` raises when the run is no longer this attempt's; it is asked before each of the steps of a save."""
        self.run_uri = run_uri
        self.attempt = attempt
        self.keep = keep
        self.check = check
        self.newest: str | None = None
        """URI of the newest checkpoint that is complete."""
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def save(self, state: TrainState, best: float | None) -> None:
        """Starts to write ``state``, whose tensors are now the saver's; waits for the one before it first.

        ``best`` is its response perplexity where that is the lowest so far.
        """
        self.wait()
        if self.error is None:
            self._thread = threading.Thread(target=self._run, args=(state, best), name="checkpoint", daemon=True)
            self._thread.start()

    def wait(self, timeout: float | None = None) -> None:
        """Waits until what was handed in is written or has failed."""
        if self._thread is not None:
            self._thread.join(timeout)

    def _run(self, state: TrainState, best: float | None) -> None:
        try:
            self.newest = storage.with_retries(self.run_uri, self._write, state)
            storage.with_retries(self.run_uri, self._tidy, self.newest, best)
        except Exception as error:
            self.error = error

    def _write(self, state: TrainState) -> str:
        self.check()
        return checkpoint.save(self.run_uri, state, attempt=self.attempt, check=self.check)

    def _tidy(self, newest: str, best: float | None) -> None:
        # Asked in every try: best.json, and the checkpoints that go, are the run's, not this attempt's.
        self.check()
        if best is not None:
            checkpoint.mark_best(self.run_uri, newest, best)
        retention.retain(self.run_uri, self.keep, attempt=self.attempt)
