"""Lines of progress: how much is done, how fast, and how long the rest takes."""

import logging
import time
from collections.abc import Iterator
from typing import Any

import ray

EVERY = 10.0
"""Seconds between two lines."""

log = logging.getLogger(__name__)


class StageLog:
    """The progress of one stage, told in the log every :data:`EVERY` seconds."""

    def __init__(self, stage: str, unit: str):
        self._stage, self._unit = stage, unit
        self._began = self._spoke = time.monotonic()

    def update(self, items: int, share: float) -> None:
        """So many items are done, and this share of the whole stage (0 … 1), which tells the time to go."""
        now = time.monotonic()
        if now - self._spoke < EVERY or not share:
            return
        self._spoke = now
        seconds = now - self._began
        log.info(
            "%s: %d %s, %.0f a second, %.0f %% done, %.0f s to go",
            *(self._stage, items, self._unit, items / seconds, 100 * share, seconds * (1 / share - 1)),
        )

    def end(self, items: int) -> None:
        """The stage is over."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        log.info("%s: %d %s in %.1f s (%.0f a second)", self._stage, items, self._unit, seconds, items / seconds)


def as_completed(refs: list[Any], progress: StageLog, items: int) -> Iterator[Any]:
    """Results of tasks in the order in which they end; all of them together do so many items."""
    total = len(refs)
    while refs:
        ready, refs = ray.wait(refs, num_returns=1)
        yield from ray.get(ready)
        done = (total - len(refs)) / total
        progress.update(round(items * done), done)
