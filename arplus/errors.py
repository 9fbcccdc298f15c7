"""The errors a user can cause, and the exit code that each one ends a job with."""


class UserError(ValueError):
    """The user's input, flag or file is wrong; the message names it and says what to do. Exit code 2."""

    exit_code = 2


class ResourceError(UserError):
    """The machine or cluster lacks what the job asks for (CPUs, GPUs, disk, a server). Exit code 3."""

    exit_code = 3


class RunError(RuntimeError):
    """A job ended before it was done, through nobody's input; the message says what to do. Exit code 1."""

    exit_code = 1
