"""What a Ray task of the preparation failed with, said plainly."""

from collections.abc import Iterator
from contextlib import contextmanager

import ray

from arplus.errors import ArplusError, ResourceError, UsageError


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns what a Ray task failed with into the one message that tells the user what to do."""
    try:
        yield
    except ArplusError as error:
        raise _user_error(error) or error from None
    except ray.exceptions.OutOfDiskError as error:
        raise ResourceError(f"{what}: Ray's temporary folder is full (RAY_TMPDIR chooses another): {error}") from error
    except (ray.exceptions.RayError, OSError) as error:
        if cause := _user_error(error):
            raise cause from None
        raise


def _user_error(error: BaseException | None) -> UsageError | None:
    """The user's error that a task's error came from; ``None`` where there is none."""
    while error is not None:
        cause = getattr(error, "cause", None) or error.__cause__
        if isinstance(error, UsageError) and not isinstance(error, ray.exceptions.RayTaskError):
            return error
        error = cause
    return None
