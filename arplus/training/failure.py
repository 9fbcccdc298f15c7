"""Why workers failed, in one line, with rank, node and log: for the log, the run's folder, and MLflow's tags.

Where a GPU's memory was too small, the line says how to need less.
"""

import logging
import os
import re
import socket
from collections.abc import Mapping, Sequence
from typing import Any

import ray.train
import ray.util
from ray.exceptions import RayError

from arplus.errors import ArplusError, RunError, redact
from arplus.runs import attempt
from arplus.runs.attempt import Attempt

log = logging.getLogger(__name__)

LOWER_MEMORY = (
    "to need less of a GPU's memory raise --gradient-accumulation-steps, or --workers with --zero-stage 2 or 3, and "
    "leave --precision auto; a lower --batch-size does too, and makes it another run"
)
_LONGEST = 400
"""Characters of a reason."""
_CONSEQUENCE = re.compile("connection closed by peer|connection reset|broken pipe|gloo|nccl|watchdog", re.IGNORECASE)
"""In the errors of workers that another one's end has left waiting."""


class WorkersFailedError(RunError):
    """Ray Train gave up; ``facts`` are :func:`describe`'s of the last time that workers failed, if it was for that."""

    def __init__(self, message: str, facts: Mapping[str, str]) -> None:
        super().__init__(message)
        self.facts = dict(facts)


class FailureNotes(ray.train.UserCallback):
    """Notes in the run's folder why workers failed; lives in Ray Train's controller, which then starts them again."""

    def __init__(self, run_uri: str, job: Attempt) -> None:
        self.run_uri = run_uri
        self.job = job

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Notes it, without waiting for storage that is away: the workers are to start again."""
        try:
            attempt.note_failure(self.run_uri, self.job, lambda workers: describe(worker_exceptions, workers))
        except (ArplusError, OSError) as error:
            log.warning("the reason why workers failed could not be written down: %s", error)


def here() -> str:
    """Node and log of the worker that calls it, as :class:`Attempt` keeps them."""
    try:
        file = os.readlink("/proc/self/fd/2")  # Ray writes what a worker prints into a file of its own
    except OSError:
        file = ""
    return f"{socket.gethostname()}/{ray.util.get_node_ip_address()} {file if file.endswith('.err') else ''}".strip()


def describe(exceptions: Mapping[int, Exception], workers: Sequence[str]) -> dict[str, str]:
    """The worker that failed first, as far as one can tell: ``reason``, ``rank``, and ``node`` and ``log`` if known."""
    if not exceptions:  # as where Ray Train finds that NCCL hangs (ray.train.v2.api.exceptions.NCCLHangError)
        return {"reason": "hangs, as Ray Train says in the log"}
    rank, error = min(exceptions.items(), key=lambda item: (bool(_CONSEQUENCE.search(str(item[1]))), item[0]))
    node, _, file = (workers[rank] if rank < len(workers) else "").partition(" ")
    facts = {"reason": reason(error), "rank": str(rank), "node": node, "log": file}
    return {name: value for name, value in facts.items() if value}


def reason(error: BaseException) -> str:
    """An error in one line, without credentials; one of a GPU's memory with the flags that lower it."""
    error = getattr(error, "health_check_failure", error)
    text = " ".join(" ".join(line for line in str(error).splitlines() if not line.startswith("\t")).split())
    if not isinstance(error, ArplusError | RayError):
        text = f"{type(error).__name__}: {text}"
    text = redact(text)
    # torch's by its name: Ray Train's controller does without torch, which takes more than a second to import.
    out_of_memory = text.startswith("OutOfMemoryError: ") or "CUDA out of memory" in text
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return f"{text}; {LOWER_MEMORY}" if out_of_memory else text


def sentence(facts: Mapping[str, str]) -> str:
    """The facts in words."""
    where = f"worker {facts['rank']}" if "rank" in facts else "a worker"
    where += f" on {facts['node']}" if "node" in facts else ""
    return f"{where}: {facts['reason']}" + (f" (its log: {facts['log']})" if "log" in facts else "")


def in_words(error: BaseException) -> str:
    """Why a run ended with ``error``, for its page."""
    return sentence(error.facts) if isinstance(error, WorkersFailedError) and error.facts else reason(error)


def tags(error: BaseException) -> dict[str, str]:
    """The tags of a run that ended with ``error``."""
    facts = error.facts if isinstance(error, WorkersFailedError) else {}
    return {f"failure.{name}": value for name, value in ({"reason": reason(error)} | facts).items()}
