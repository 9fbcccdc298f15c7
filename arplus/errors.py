"""The errors a user can cause, and the exit code that each one ends a job with."""

import re

NO_CREDENTIALS = (
    "must not hold a user or password: an address is written down; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, instead"
)
"""What is wrong with a URI that holds credentials."""


class UserError(ValueError):
    """The user's input, flag or file is wrong; the message names it and says what to do. Exit code 2."""

    exit_code = 2


class ResourceError(UserError):
    """The machine or cluster lacks what the job asks for (CPUs, GPUs, disk, a server). Exit code 3."""

    exit_code = 3


class RefusedError(UserError):
    """Storage refuses: credentials or bucket are wrong or, where they were right before, S3 is asked too often."""


class RunError(RuntimeError):
    """A job ended before it was done, through nobody's input; the message says what to do. Exit code 1."""

    exit_code = 1


def redacted(text: str) -> str:
    """``text`` with the user and password of its URLs masked: they belong in no message and no log."""
    return re.sub(r"://[^/@\s]+@", "://***@", text)
