"""What the preparation does about storage that fails: it waits for S3, and says plainly what went wrong."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import ray

from arplus import storage
from arplus.errors import ResourceError, UserError

T = TypeVar("T")

PATIENCE = 180.0
"""Seconds for which S3 may fail before the job does: a server that restarts, a network that is down, throttling."""
PATIENCE_WITH_REFUSALS = 20.0
"""Seconds for which it may refuse what it allowed before."""

log = logging.getLogger(__name__)


def patiently(action: Callable[[], T], uri: str) -> T:
    """The action's result; on S3 it is tried again, with growing pauses, for :data:`PATIENCE` seconds.

    Refusals are tried again too, for a shorter time: S3 says ACCESS_DENIED when it means "slower"
    (ray-project/ray#55055), and whether the credentials are right was found out before the work began. A missing
    file is not tried again. Raises what the action raised last.

    Ray Data's own list (``DataContext.retried_io_errors``) does not come into it: all reading and writing is ours.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return action()
        except UserError as error:
            patience = PATIENCE if isinstance(error, ResourceError) else PATIENCE_WITH_REFUSALS
            if storage.is_local(uri) or "no such file" in str(error) or time.monotonic() + pause > began + patience:
                raise
            log.warning("%s; trying again in %.1f s", error, pause)
        time.sleep(pause)
        pause = min(15.0, pause * 2)


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns what a Ray task failed with into the one message that tells the user what to do."""
    try:
        yield
    except UserError as error:
        raise _user_error(error) or error from None
    except ray.exceptions.OutOfDiskError as error:
        raise ResourceError(f"{what}: Ray's temporary folder is full (RAY_TMPDIR chooses another): {error}") from error
    except (ray.exceptions.RayError, OSError) as error:
        if cause := _user_error(error):
            raise cause from None
        raise


def _user_error(error: BaseException | None) -> UserError | None:
    """The user's error that a task's error came from; ``None`` where there is none."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UserError) and not isinstance(error, ray.exceptions.RayTaskError):
            return error
        error = cause
    return None
