"""What Ray prints of a run in which nothing is wrong, and what looks like an error: left out by its words alone."""

import contextlib
import os
import tempfile
from collections.abc import Iterator
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from arplus.cluster import ray_private

HARMLESS = "has constructor arguments in the object store and max_restarts > 0"
"""Ray 2.60 says so of its own actors (ray#53727): of Ray Train's PreemptionWatcher and of Ray Data's MapWorker.

What they are made of lives as long as the run, so they can be started again.
"""
EXPECTED = ("Failed to send resource request", "Graceful shutdown of backend failed. This is expected")
"""What Ray Train's controller says with a traceback, though it goes on: a busy machine does not answer it at once, and
a worker that has died cannot end as the others do."""
STATISTICS = "ray::_StatsActor."
"""In an error of Ray Data's that nobody handles, nor need: the actor that keeps its statistics ends with the run that
started it, and another run's reports do not find their data set in the next one. We read no statistics."""
_TRACEBACK = ("Traceback", " ", "\t", "ray.exceptions.", "The actor is dead because", "KeyError: 'dataset_")
"""Starts of the lines that follow."""
_NO_NODE = "1".rjust(56, "0")


def leave_out() -> None:
    """Leaves :data:`HARMLESS` out of what this process prints, be it of its own or of its workers; once connected.

    And errors in Ray Data's :data:`STATISTICS`, and the tracebacks of what is :data:`EXPECTED`, whose own line stays.
    """
    ray_private.choose_worker_lines(_Chosen().shows)
    _say_it_unheard()


class _Chosen:
    """Which of the workers' lines are shown."""

    def __init__(self) -> None:
        self.tracing = set[Any]()
        """Processes in the midst of a traceback that is not shown."""

    def shows(self, line: str, process: Any) -> bool:
        """Whether a line of a process is shown; its lines come in order."""
        if process in self.tracing:
            if line.startswith(_TRACEBACK):
                return False
            self.tracing.discard(process)
        if any(words in line for words in (*EXPECTED, STATISTICS)):
            self.tracing.add(process)
        return HARMLESS not in line and STATISTICS not in line


def _say_it_unheard() -> None:
    """Makes Ray say it here and now, unheard: it says it once per process, past Python's streams.

    The actor is bound to a node that is not there, so nothing is started.
    """
    there = NodeAffinitySchedulingStrategy(_NO_NODE, soft=False)
    with without_harmless():
        ray.kill(_Restarted.options(scheduling_strategy=there).remote(ray.put(None)))  # type: ignore[attr-defined]


@ray.remote(num_cpus=0, max_restarts=1)
class _Restarted:
    def __init__(self, _: object) -> None:
        pass


@contextlib.contextmanager
def without_harmless() -> Iterator[None]:
    """Holds back what any part of this process writes to its standard error, and then writes the rest."""
    with contextlib.ExitStack() as stack:
        try:
            error = os.dup(2)
        except OSError:  # it is closed
            yield
            return
        stack.callback(os.close, error)
        file = stack.enter_context(tempfile.TemporaryFile())
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(error, 2)
            file.seek(0)
            rest = b"".join(line for line in file if HARMLESS.encode() not in line)
            if rest:
                os.write(2, rest)
