"""What this process is and has: whether Ray started it as a job, memory, a folder, variables for a while, a thread."""

import contextlib
import os
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import TypeVar

from arplus.errors import UsageError

T = TypeVar("T")

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable that Ray sets for the process that a submitted job is."""


def peak_memory_bytes() -> int:
    """The largest resident set so far. Not getrusage's, which begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10


def own_folder() -> Path:
    """A folder for temporary files that is this user's alone. Raises :class:`UsageError` where there can be none."""
    folder = Path(tempfile.gettempdir(), f"arplus-{os.getuid()}")
    try:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        found = folder.lstat()
        if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid():
            folder.chmod(0o700)
            return folder
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}; set TMPDIR to a folder that you can write to") from error
    raise UsageError(f"{folder}: is not a folder of your own; remove it, or set TMPDIR to another folder")


@contextlib.contextmanager
def environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Sets variables of this process and of those that it starts meanwhile; afterwards they are as before."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ |= variables
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def in_thread(work: Callable[[], T], seconds: float | None = None) -> T:
    """What ``work`` gives, or raises, in a thread of its own. After ``seconds`` it is left alone: TimeoutError."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(work())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name=getattr(work, "__qualname__", None), daemon=True).start()
    try:
        return outcome.result(seconds)
    except TimeoutError:
        if outcome.done():  # it is the work's own
            raise
        raise TimeoutError(f"no answer within {seconds:g} s") from None
