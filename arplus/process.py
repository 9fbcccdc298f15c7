"""What this process is: whether Ray started it as a job, and its peak memory."""

from pathlib import Path

SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""The variable that Ray sets for the process that a submitted job is."""


def peak_memory_bytes() -> int:
    """The largest resident set so far. Not getrusage's, which begins with that of the process that started this one."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) << 10
