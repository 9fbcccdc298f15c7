"""What this process is and has: whether Ray started it as a job, its peak memory, a folder of its user's own."""

import contextlib
import os
import stat
import tempfile
from pathlib import Path

from arplus.errors import UsageError

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
