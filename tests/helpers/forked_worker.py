"""What Ray starts instead of its ``setup_worker.py`` in tests: asks :mod:`helpers.forks` for a worker, and ends.

A worker that is to run otherwise than as a plain child of this Python starts as ever.
"""

import json
import os
import re
import socket
import sys
from pathlib import Path

CONTEXT = "--serialized-runtime-env-context="
OURS = (CONTEXT, "--language=")


def ask(place: str, variables: dict[str, str], arguments: list[str]) -> None:
    """Hands arguments, variables, folder and output to the server at the socket ``place``."""
    request = {"arguments": arguments, "variables": variables, "folder": os.getcwd()}
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(place)
        socket.send_fds(server, [b"."], [0, 1, 2])
        server.sendall(json.dumps(request).encode())


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
    ask(place, variables, arguments)


if __name__ == "__main__":
    main()
