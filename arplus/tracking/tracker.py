"""The one through which everything is logged: a local record, a bounded queue, a background thread."""

import contextlib
import json
import logging
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

from arplus import storage
from arplus.errors import UserError, redacted
from arplus.tracking.client import (
    METRICS_A_REQUEST,
    TAG_LENGTH,
    Event,
    brief,
    is_final,
    make_client,
    send,
    without_repeats,
)
from arplus.tracking.run import Run

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

CAPACITY = 10_000
"""Events that wait for the server at most; further ones are only written to the record."""
_GIVE_UP_S = 900.0
"""Seconds after which a tag or artifact that the server cannot take stops holding up the metrics behind it."""
_LONGEST_WAIT_S = 30.0
_BYTES_A_SECOND = 5 << 20
"""What a slow server takes of a file: the 1.2 GB of a large model's weights are given four minutes."""
_AWAY = "MLflow does not answer, trying again: %s"


class Tracker:
    """Logs to one run without ever making its caller wait for, or fail with, the server.

    Every call writes to the record, queues and returns. A daemon thread sends; it retries for as long as the server is
    away. Only the queue's bound loses points, and only for the server: they are counted, said once in a warning and
    again by :meth:`close`, and the record has them all. Nothing is sent before the first call, so that attaching to a
    run (after a worker's restart, say) works while the server is down. A point of a step that an earlier tracker of
    the run has sent is left out, but with ``repeats``.
    """

    def __init__(
        self,
        run: Run,
        *,
        record: str | Path,
        keep: str | None = None,
        capacity: int = CAPACITY,
        repeats: bool = False,
    ) -> None:
        """``keep`` is the URI of a folder to which :meth:`close` copies a record that the server lacks a part of."""
        self.run = run
        self.record = Path(record)
        self._keep = keep
        self.dropped = 0
        """Events that will not reach the server by themselves."""
        self._capacity = capacity
        self._repeats = repeats
        self._pending: deque[Event] = deque()
        self._changed = threading.Condition()
        self._deadline: float | None = None  # set by close(): when to stop trying
        self._closed = False
        self._thread: threading.Thread | None = None
        self._said: set[str] = set()
        self._prepare_record()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at ``step`` (examples trained on)."""
        self._put(*({"key": k, "value": float(v), "step": int(step)} for k, v in metrics.items()))

    def log_text(self, name: str, text: str) -> None:
        """Logs a text as the artifact ``name``, which may hold folders."""
        self._put({"artifact": name, "text": text})

    def log_file(self, path: str | Path, folder: str | None = None) -> None:
        """Logs a local file as an artifact, in ``folder`` where given. It must stay in place until :meth:`close`."""
        self._put({"artifact": folder, "file": str(Path(path).absolute())})

    def log_dataset(self, name: str, fingerprint: str, source: str, context: str) -> None:
        """Notes a data set that the run reads: its name, fingerprint, URI, and what for (``training``, …)."""
        self._put({"dataset": {"name": name, "fingerprint": fingerprint, "source": source, "context": context}})

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Sets tags; a tag set again takes the new value."""
        self._put(*({"tag": k, "value": str(v)[:TAG_LENGTH]} for k, v in tags.items()))

    def mark(self, status: Status) -> None:
        """Sets the run's status at once, for a process that may not live until :meth:`close`, which may set another."""
        self._put({"status": status}, always=True)

    def close(self, status: Status | None = None, timeout: float = 30.0) -> int:
        """Sends what waits, for ``timeout`` seconds at most, and ends the run as ``status``; None leaves it as it is.

        For files that wait there is more time, by :data:`_BYTES_A_SECOND`. Gives the number of events that did not
        reach the server. Calling it again changes nothing.
        """
        if self._closed:
            return self.dropped
        if status is not None:
            self._put({"status": status}, always=True)
        with self._changed:
            self._closed = True
            timeout += sum(map(_bytes, self._pending)) / _BYTES_A_SECOND
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout)
        with self._changed:
            self.dropped += len(self._pending)
        if self.dropped:
            logger.warning(
                "MLflow (%s) misses %d logged values; send them with: python -m arplus.tracking replay %s --mlflow %s",
                redacted(self.run.uri),
                self.dropped,
                shlex.quote(self._kept()),
                shlex.quote(redacted(self.run.uri)),
            )
        return self.dropped

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close("FINISHED")
        else:
            self.close("FAILED" if issubclass(kind, Exception) else "KILLED")

    def _kept(self) -> str:
        """Where the record can be read when this machine is gone; the local file where there is no such place."""
        if self._keep is not None:
            try:
                storage.write_bytes(storage.join(self._keep, f"{uuid4().hex[:8]}.jsonl"), self.record.read_bytes())
                return self._keep
            except (UserError, OSError) as error:
                logger.warning("the record of logged values is on this machine alone: %s", error)
        return str(self.record)

    def _prepare_record(self) -> None:
        """Ends a line that an earlier process was killed in, so that the next one does not grow onto it."""
        with self._record_errors():
            self.record.parent.mkdir(parents=True, exist_ok=True)
            with open(self.record, "ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")

    def _put(self, *events: Event, always: bool = False) -> None:
        assert not self._closed, "the tracker is closed"
        head = {"run_id": self.run.run_id, "timestamp": time.time_ns() // 1_000_000}
        full = [head | event for event in events]
        with self._changed:
            with self._record_errors(), open(self.record, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in full))
            if always or len(self._pending) + len(full) <= self._capacity:
                self._pending.extend(full)
                self._changed.notify()
            else:
                self.dropped += len(full)
                self._say_once("the queue to MLflow is full: values go to %s only", self.record)
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
                self._thread.start()

    def _send_all(self) -> None:
        client = None
        known: dict[str, set[int]] = {}
        while batch := self._next_batch():
            wait, since = 1.0, time.monotonic()
            while True:
                try:
                    client = client or make_client(self.run.uri)
                    again = self._repeats or "key" not in batch[0]
                    if new := batch if again else without_repeats(client, batch, known):
                        send(client, new)
                    break
                except Exception as error:  # whatever a server or a network may do, training goes on
                    with self._changed:
                        if self._past_deadline():
                            return
                        stuck = "key" not in batch[0] and time.monotonic() - since > _GIVE_UP_S
                        if stuck or is_final(error):
                            self.dropped += len(batch)
                            self._say_once("MLflow refused logged values, which stay in the record: %s", brief(error))
                            break
                        self._say_once(_AWAY, brief(error))
                        # Not just wait(): each call of log() notifies, and must not wake an impatient retry.
                        if self._changed.wait_for(lambda: self._closed, timeout=wait):
                            self._changed.wait(timeout=0.5)
                        wait = min(2 * wait, _LONGEST_WAIT_S)
            with self._changed:
                for _ in batch:
                    self._pending.popleft()
                if _AWAY in self._said:
                    self._said.remove(_AWAY)
                    logger.warning("MLflow answers again; %d values wait", len(self._pending))

    def _next_batch(self) -> list[Event]:
        """The events to send next, which stay queued until they are sent; none when the tracker is closed and done."""
        with self._changed:
            while not self._pending and not self._closed:
                self._changed.wait()
            if not self._pending or self._past_deadline():
                return []
            if "key" in self._pending[0]:
                return list(islice(takewhile(lambda event: "key" in event, self._pending), METRICS_A_REQUEST))
            return [self._pending[0]]

    def _past_deadline(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    @contextlib.contextmanager
    def _record_errors(self) -> Iterator[None]:
        """A full disk must not end the training either."""
        try:
            yield
        except OSError as error:
            self._say_once("cannot write the record of logged values: %s", error)

    def _say_once(self, message: str, *args: object) -> None:
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *args)


def _bytes(event: Event) -> int:
    """The size of the file that an event names."""
    try:
        return os.path.getsize(event["file"]) if "file" in event else 0
    except OSError:
        return 0
