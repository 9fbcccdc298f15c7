"""The commands as a user types them, with this Python: on a Ray of their own, on the tests' cluster, or on none."""

import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from helpers import forks

ROOT = Path(__file__).parents[2]

MANY = """
import runpy, sys
for command in sys.argv[1:]:
    sys.argv = eval(command)
    code = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
    print("\\0", code, file=sys.stderr)
"""


def away() -> dict[str, str]:
    """The environment, away from any Ray cluster and MLflow server that it names."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}


def shared() -> dict[str, str]:
    """The same, on the tests' own cluster."""
    import ray

    ours = {k: v for k, v in os.environ.items() if k.startswith("RAY_")}
    return away() | ours | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}


def run_python(
    arguments: Sequence[object], *, environment: dict[str, str], folder: Path = ROOT, stdin: str = "", timeout: float
) -> subprocess.CompletedProcess[str]:
    """``python ARGUMENTS``, which begin with a script or ``-c``; as a fork where the environment has their server."""
    words = list(map(str, arguments))
    with TemporaryFile("w+") as given, TemporaryFile("w+") as out, TemporaryFile("w+") as error:
        given.write(stdin)
        given.seek(0)
        process = forks.start(words, folder, environment, [file.fileno() for file in (given, out, error)])
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            error.seek(0)
            raise AssertionError(f"{words}: no end within {timeout} s\n{error.read()}") from None
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess(words, process.returncode, out.read(), error.read())


def run_worker(name: str, *arguments: object, timeout: float, given: str = "") -> dict[str, Any]:
    """The JSON that a script beside this one prints last; it starts a cluster of its own, and hangs where Ray does."""
    # Without what this process's own cluster, if it has one, left there, such as its port; and GPUs may be counted.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CUDA_VISIBLE_"))}
    script = Path(__file__).with_name(name)
    done = run_python(
        [script, *arguments], environment=environment | {"RAY_AUTH_MODE": "disabled"}, stdin=given, timeout=timeout
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def words(command: str) -> list[str]:
    """What Python is given of ``jobs/…``."""
    script, *arguments = shlex.split(command)
    return [str(ROOT / script), *arguments]


def run(
    command: str,
    *,
    folder: Path = ROOT,
    stdin: str = "",
    environment: dict[str, str] | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Runs ``jobs/…``, by default away from Ray."""
    return run_python(words(command), folder=folder, stdin=stdin, environment=environment or away(), timeout=timeout)


def run_all(commands: list[str], folder: Path) -> list[tuple[int, str]]:
    """Exit code and error output of commands that run one after another in one process, which imports once."""
    command = [sys.executable, "-c", MANY, *(repr(words(c)) for c in commands)]
    done = subprocess.run(command, cwd=folder, env=away(), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said, found = "", []
    for line in done.stderr.splitlines(keepends=True):
        if line.startswith("\0"):
            found.append((int(line[1:]), said))
            said = ""
        else:
            said += line
    return found
