"""The commands as a user types them, with this Python: on a Ray of their own, on the tests' cluster, or on none."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

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


def run_worker(name: str, *arguments: object, timeout: float, given: str | None = None) -> dict[str, Any]:
    """The JSON that a script beside this one prints last; it starts a cluster of its own, and hangs where Ray does."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name(name), *map(str, arguments)],
        input=given,
        # Without what this process's own cluster, if it has one, left there, such as its port; and GPUs may be counted.
        env={k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "CUDA_VISIBLE_"))}
        | {"RAY_AUTH_MODE": "disabled"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def words(command: str) -> list[str]:
    """What the operating system is given of ``jobs/…``."""
    script, *arguments = shlex.split(command)
    return [sys.executable, str(ROOT / script), *arguments]


def run(
    command: str,
    *,
    folder: Path = ROOT,
    stdin: str = "",
    environment: dict[str, str] | None = None,
    timeout: float = 200,
) -> subprocess.CompletedProcess[str]:
    """Runs ``jobs/…``, by default away from Ray."""
    return subprocess.run(
        words(command),
        cwd=folder,
        env=environment or away(),
        input=stdin,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def run_all(commands: list[str], folder: Path) -> list[tuple[int, str]]:
    """Exit code and error output of commands that run one after another in one process, which imports once."""
    command = [sys.executable, "-c", MANY, *(repr(words(c)[1:]) for c in commands)]
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
