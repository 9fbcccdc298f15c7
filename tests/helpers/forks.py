"""Processes as forks of one that has imported torch, DeepSpeed and MLflow, which takes seven seconds of a CPU.

Ray starts a worker by a script of its own; here that script is ``forked_worker.py``, which asks the server below for a
child. The child takes over the worker's arguments, variables, folder and output, and is what Ray would have started.
Ray reads variables at its import, a job's number among them. So workers of the same variables, which those of a job
are, have a server of their own: a fork of the first that has imported Ray with them. :func:`start` asks for a process
that runs a job as this Python would. On a machine with a GPU all start as ever: CUDA does not outlive a fork.
"""

import atexit
import contextlib
import gc
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
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

PLACE = "ARPLUS_FORKS"
"""Variable that names the server's socket."""
IDLE_S = 10.0
"""After so long without a worker and a request a server of workers ends: each holds 90 MB."""

IMPORTED = ("deepspeed", "mlflow.tracking", "pandas", "pyarrow.compute", "pyarrow.dataset", "pyarrow.parquet")
IMPORTED += ("arplus.model.network", "arplus.storage", "torch.utils.data")
# What the first optimizer and DeepSpeed's first engine import by themselves: torch's compiler, a second each.
IMPORTED += ("torch._dynamo", "deepspeed.runtime.zero.muon.muon_optimizer")
IMPORTED += ("arplus.evaluation.replies", "arplus.tracking", "fsspec", "jsonschema", "rich.live", "sacrebleu")
# What a run's first engine and first tracker import by themselves, and what Ray's libraries import beside Ray.
IMPORTED += ("deepspeed.module_inject", "deepspeed.moe.layer", "setuptools", "distutils.util", "torch.profiler")
IMPORTED += ("mlflow.store.tracking.sqlalchemy_store", "mlflow.genai", "mlflow.system_metrics.system_metrics_monitor")
IMPORTED += ("fsspec.implementations.local", "pyarrow.json", "pydantic.v1", "logging.config", "socketserver")
IMPORTED_BY_WORKERS = ("ray.train.v2.api.data_parallel_trainer", "ray.data", "arplus.training.trainer")


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


def start(arguments: Sequence[str], folder: Path, variables: Mapping[str, str], files: Sequence[int]) -> Any:
    """Starts ``python ARGUMENTS``, which begin with a script or ``-c``, in a process group of its own.

    By the server that ``variables`` name, if they do. ``files`` become standard input, output and error. What is
    returned has ``pid``, ``wait(timeout)`` and ``returncode``, as :class:`subprocess.Popen` has.
    """
    if PLACE in variables:
        return Process(arguments, folder, variables, files)
    given, output, error = files
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=variables, stdin=given, stdout=output, stderr=error, start_new_session=True
    )


class Process:
    """A fork of the server's."""

    def __init__(
        self, arguments: Sequence[str], folder: Path, variables: Mapping[str, str], files: Sequence[int]
    ) -> None:
        self.returncode: int | None = None
        self._server = socket.socket(socket.AF_UNIX)
        self._server.connect(variables[PLACE])
        socket.send_fds(self._server, [b"."], files)
        request = {"arguments": list(arguments), "variables": dict(variables), "folder": str(folder), "job": True}
        self._server.sendall(json.dumps(request).encode())
        self._server.shutdown(socket.SHUT_WR)
        self.pid = int(self._server.recv(32))

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, or the signal that ended it, below 0. Raises :class:`subprocess.TimeoutExpired`."""
        if self.returncode is None:
            if not select.select([self._server], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(int(self._server.recv(32)))
            self._server.close()
        return self.returncode


def serve(place: str) -> None:
    """Forks a process for each request at the socket ``place``, until standard input ends."""
    os.environ["DS_ACCELERATOR"] = "cpu"  # as the engine sets it before it imports DeepSpeed
    code = 0

    def leave() -> None:
        """Ends without taking apart all that was imported, which takes seconds and copies what was shared."""
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first, and so the last to be called
    _import(IMPORTED)
    importlib.import_module("ready_stores").install(Path(place).with_name("mlflow.db"))
    assert "ray" not in sys.modules, "it reads its variables at import, and a worker has some of its own"
    sys.path.remove(str(Path(__file__).parent))
    listener = _listen(place)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    try:
        _fork_for_each(listener)
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        raise
    except BaseException:
        code = 1
        raise


def _import(names: Sequence[str]) -> None:
    for name in names:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # so that no fork's collector looks through it, and copies it


def _import_ray() -> None:
    """What workers import of Ray, and no number drawn by Ray's own generator.

    It is seeded when it is first used. Were that before the fork, all workers would draw the same ids for what they
    start, as each class of an actor does when it is made.
    """
    import ray.actor
    from ray.actor import ActorClassID

    drawn = types.SimpleNamespace(from_random=lambda: ActorClassID(os.urandom(ActorClassID.size())))
    with mock.patch.object(ray.actor, "ActorClassID", drawn):
        _import(IMPORTED_BY_WORKERS)
    assert _drawn_by_a_fork() != _drawn_by_a_fork()


def _drawn_by_a_fork() -> bytes:
    from ray._raylet import UniqueID

    end, begin = os.pipe()
    if (pid := os.fork()) == 0:
        os.write(begin, UniqueID.from_random().binary())
        os._exit(0)
    os.close(begin)
    os.waitpid(pid, 0)
    with open(end, "rb") as drawn:
        return drawn.read()


def _listen(place: str) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    return listener


def _fork_for_each(listener: socket.socket, idle_s: float | None = None) -> None:
    """Returns in each fork at the end of what it did; in this process when standard input ends, or when it was idle."""
    running: dict[int, socket.socket] = {}
    serving: dict[int, str] = {}

    def reap(*_: object) -> None:
        """Leaves nothing behind of processes that have ended, and tells their status."""
        with contextlib.suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                serving.pop(ended[0], None)
                with running.pop(ended[0]) as asked, contextlib.suppress(OSError):
                    asked.sendall(str(ended[1]).encode())

    with listener:
        signal.signal(signal.SIGCHLD, reap)
        while sys.stdin not in (ready := select.select([listener, sys.stdin], [], [], idle_s)[0]):
            if not ready:
                if idle_s == 0:
                    return
                if not running:
                    os.unlink(listener.getsockname())  # nobody asks from now on; one who just did is served
                    idle_s = 0
                continue
            asked, request, files = _taken(listener)
            if request.get("serve") in serving.values():
                asked.close()
                continue
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])  # until it is known whose end it would be
            pid = os.fork()
            if pid == 0:
                listener.close()
                for other in (asked, *running.values()):
                    other.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
                if "serve" in request:
                    os.environ.clear()
                    os.environ.update(request["variables"])
                    _import_ray()
                    _fork_for_each(_listen(request["serve"]), IDLE_S)
                else:
                    _become(request, files)
                return
            running[pid] = asked
            if "serve" in request:
                serving[pid] = request["serve"]
            with contextlib.suppress(OSError):  # whoever asked may be gone
                asked.sendall(str(pid).ljust(32).encode())
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
            for file in files:
                os.close(file)


def _taken(listener: socket.socket) -> tuple[socket.socket, dict[str, Any], list[int]]:
    asked = listener.accept()[0]
    _, files, _, _ = socket.recv_fds(asked, 1, 3)
    with asked.makefile("rb") as text:
        return asked, json.load(text), list(files)


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Goes on as the process that was asked for, to its end."""
    import numpy as np

    os.setpgid(0, 0)  # Ray ends a worker's group
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["variables"])
    np.random.seed()
    if "job" in request and "RAY_ADDRESS" not in os.environ:  # it may start a Ray of its own
        use()
    sys.argv = request["arguments"]
    if sys.argv[0] != "-c":
        sys.path.insert(0, str(Path(sys.argv[0]).parent))
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    sys.modules["__main__"] = main = types.ModuleType("__main__")
    sys.path.insert(0, "")
    exec(compile(sys.argv.pop(1), "<string>", "exec"), vars(main))


if __name__ == "__main__":
    serve(sys.argv[1])
