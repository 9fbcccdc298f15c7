"""Ray's workers as forks of one process that has imported torch, DeepSpeed and MLflow, which takes each some seconds.

Ray starts a worker by a script of its own; here that script is ``forked_worker.py``, which asks the server below for a
child. The child takes over the worker's arguments, variables, folder and output, and is what Ray would have started.
On a machine with a GPU workers start as ever: CUDA does not outlive a fork.
"""

import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PLACE = "ARPLUS_FORKS"
"""Variable that names the server's socket."""

IMPORTED = ("deepspeed", "mlflow.tracking", "pandas", "pyarrow.compute", "pyarrow.dataset", "pyarrow.parquet")
IMPORTED += ("arplus.model.network", "arplus.storage", "torch.utils.data")
# What the first optimizer and DeepSpeed's first engine import by themselves: torch's compiler, a second each.
IMPORTED += ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")


@contextlib.contextmanager
def served() -> Iterator[None]:
    """A server for all clusters that start meanwhile, in this process or in one that calls :func:`use`."""
    if Path("/dev/nvidiactl").exists():
        yield
        return
    with tempfile.TemporaryDirectory(prefix="forks-", dir="/tmp") as folder:  # a short path: a socket lies there
        place = f"{folder}/socket"
        log = Path(folder, "log")
        # One thread, as Ray gives to a worker of a CPU or less, by a variable that is read at import.
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        with log.open("wb") as output:
            server = subprocess.Popen(
                [sys.executable, __file__, place],
                env=variables,
                stdin=subprocess.PIPE,  # closed by the end of this process, however it ends
                stdout=subprocess.PIPE,
                stderr=output,
                start_new_session=True,
            )
        assert server.stdout is not None
        assert server.stdout.readline(), log.read_text()
        os.environ[PLACE] = place
        use()
        try:
            yield
        finally:
            del os.environ[PLACE]
            server.communicate(timeout=120)


def use() -> None:
    """Lets the workers of a cluster that this process starts be forked, where there is a server."""
    if PLACE in os.environ:
        from ray._private import ray_constants

        ray_constants.SETUP_WORKER_FILENAME = str(Path(__file__).with_name("forked_worker.py"))


def serve(place: str) -> None:
    """Forks a worker for each request at the socket ``place``, until standard input ends."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # as the engine sets it before it imports DeepSpeed
    for name in IMPORTED:
        importlib.import_module(name)
    assert "ray" not in sys.modules, "it reads its variables at import, and a worker has some of its own"
    sys.path.remove(str(Path(__file__).parent))
    signal.signal(signal.SIGCHLD, _reap)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(place)
        listener.listen(64)
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
            request, outputs = _taken(listener)
            if os.fork() == 0:
                listener.close()
                _become(request, outputs)
                return
            for output in outputs:
                os.close(output)


def _reap(*_: object) -> None:
    """Leaves nothing behind of workers that have ended."""
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _taken(listener: socket.socket) -> tuple[dict[str, Any], list[int]]:
    with listener.accept()[0] as asked:
        _, outputs, _, _ = socket.recv_fds(asked, 1, 3)
        with asked.makefile("rb") as text:
            return json.load(text), list(outputs)


def _become(request: dict[str, Any], outputs: list[int]) -> None:
    """Goes on as the worker that was asked for, to its end."""
    import numpy as np

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.setpgid(0, 0)  # Ray ends a worker's group
    for number, output in enumerate(outputs):
        os.dup2(output, number)
        os.close(output)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    np.random.seed()
    sys.argv = request["arguments"]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    serve(sys.argv[1])
