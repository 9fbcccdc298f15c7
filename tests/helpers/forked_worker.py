"""What Ray starts instead of its ``setup_worker.py`` in tests: asks :mod:`helpers.forks` for a worker, and ends.

A worker that is to run otherwise than as a plain child of this Python starts as ever.
"""

import json
import os
import re
import socket
import sys
import time
import zlib
from pathlib import Path

CONTEXT = "--serialized-runtime-env-context="
OURS = (CONTEXT, "--language=")


def ask(place: str, request: dict[str, object], files: list[int]) -> None:
    """Hands a request and files to the server at the socket ``place``."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        socket.send_fds(server, [b"."], files)
        server.sendall(json.dumps(request).encode())


def ask_for_worker(place: str, variables: dict[str, str], arguments: list[str]) -> None:
    """Hands arguments, variables, folder and output to the server of such workers, which may have to begin."""
    workers = f"{place}-{zlib.crc32(json.dumps(variables, sort_keys=True).encode())}"
    deadline = time.monotonic() + 60
    while True:
        try:
            return ask(workers, {"arguments": arguments, "variables": variables, "folder": os.getcwd()}, [0, 1, 2])
        except (FileNotFoundError, ConnectionRefusedError):
            if time.monotonic() > deadline:
                raise
        ask(place, {"serve": workers, "variables": variables}, [])  # which is heard once
        time.sleep(0.05)


def main() -> None:
    """Starts the worker that the command line describes."""
    said = [a.removeprefix(CONTEXT) for a in sys.argv if a.startswith(CONTEXT)]
    context = json.loads(said[0]) if said else {}
    arguments = [a for a in sys.argv[1:] if not a.startswith(OURS)]
    variables = dict(os.environ)
    for name, value in (context.get("env_vars") or {}).items():
        variables[name] = re.sub(r"\$\{\w+\}", "", os.path.expandvars(value))  # as Ray does
    other = context.get("command_prefix") or context.get("override_worker_entrypoint")
    place = os.environ.get("ARPLUS_FORKS")
    if not place or other or context.get("py_executable", sys.executable) != sys.executable:
        original = Path(arguments[0]).with_name("setup_worker.py")
        os.execv(sys.executable, [sys.executable, str(original), *sys.argv[1:]])
    ask_for_worker(place, variables, arguments)


if __name__ == "__main__":
    main()
