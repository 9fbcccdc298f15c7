"""What an epoch reads from the S3 server does not grow with the number of workers: each window is read once."""

import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import ray
from helpers.prepared import write_dataset

from arplus import storage
from arplus.cluster import connection
from arplus.config import ModelConfig
from arplus.data.collate import BatchSpec
from arplus.data.dataset import Dataset
from arplus.data.loader import RankLoader
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker, serve

pytestmark = pytest.mark.soak


class CountingRelay:
    """Stands before a server on the loopback and counts the bytes that it sends."""

    def __init__(self, port: int) -> None:
        self.sent = 0
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self._lock = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Takes no further connection."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._server)
                threading.Thread(target=self._relay, args=(client, server, False), daemon=True).start()
                threading.Thread(target=self._relay, args=(server, client, True), daemon=True).start()

    def _relay(self, source: socket.socket, target: socket.socket, counts: bool) -> None:
        with suppress(OSError):  # either side is gone
            while data := source.recv(1 << 16):
                target.sendall(data)
                if counts:
                    with self._lock:
                        self.sent += len(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def relay(s3_server, monkeypatch: pytest.MonkeyPatch) -> Iterator[CountingRelay]:
    """This process's AWS variables, and those of a Ray started now, point to the relay."""
    ray.shutdown()
    found = CountingRelay(urlsplit(s3_server.environment["AWS_ENDPOINT_URL"]).port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{found.port}")
    connection.connect(cpus=2)
    yield found
    ray.shutdown()
    found.close()


def test_an_epoch_reads_the_same_at_any_number_of_workers(
    s3_server: Any, relay: CountingRelay, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    groups = [[2000, 1500], [2500, 2000]]
    write_dataset(tmp_path, {"train": groups})
    for file in filter(Path.is_file, tmp_path.rglob("*")):
        storage.write_bytes(s3_server.uri(f"bytes-read/{file.relative_to(tmp_path)}"), file.read_bytes())
    dataset = Dataset.open(s3_server.uri("bytes-read"))
    spec = BatchSpec.of(ModelConfig(), dataset.sizes)
    sampler = EpochSampler(split=dataset.split("train"), batch_size=64, window_batches=16, seed=1, shuffled=True)
    read = {}
    for workers in (1, 2, 4):
        maker = WindowMaker(sampler=sampler, spec=spec, workers=workers)
        server = serve(maker) if workers > 1 else None
        loaders = [RankLoader(maker, rank, server) for rank in range(workers)]
        before = relay.sent
        with ThreadPoolExecutor(workers) as ranks:
            examples = ranks.map(
                lambda loader: sum(len(b.example_id_B) for s in loader.batches(0) for b in s.micro_batches), loaders
            )
        assert sum(examples) == sum(map(sum, groups))
        read[workers] = relay.sent - before
    record_property("bytes_sent_per_epoch", read)
    assert max(read.values()) <= 1.1 * min(read.values()), read
