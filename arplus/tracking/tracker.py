"""The one through which everything is logged: a local record, a bounded queue, threads in the background.

While the server is away they wait and try again, and what a run's end leaves unsent can be replayed
(:mod:`arplus.tracking.replay`). What the server refuses stays in the record alone (:mod:`arplus.tracking.refusal`).
"""

import contextlib
import json
import logging
import os
import shlex
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice, takewhile
from pathlib import Path
from typing import Literal, Self
from uuid import uuid4

from arplus import storage
from arplus.errors import ArplusError, redact
from arplus.tracking.client import METRICS_A_REQUEST, TAG_LENGTH, make_client, send, without_repeats
from arplus.tracking.refusal import (
    Event,
    Refused,
    advice,
    brief,
    is_final,
    kind_of,
    send_each,
    status_of,
    title,
    titles,
)
from arplus.tracking.run import RunRef, keep_of, record_of

logger = logging.getLogger(__name__)

Status = Literal["FINISHED", "FAILED", "KILLED"]

CAPACITY = 10_000
"""Events that wait for the server at most; further ones are only written to the record."""
_GIVE_UP_S = 900.0
"""Seconds after which a tag that the server cannot take, while it answers, stops holding up what is behind it."""
_AWAY = (502, 503, 504)
"""What a proxy answers for a server that is not there."""
_LONGEST_WAIT_S = 30.0
_BYTES_A_SECOND = 5 << 20
"""What a slow server takes of a file: the 1.2 GB of a large model's weights are given four minutes."""


@dataclass
class _Lane:
    """Events that wait for the server in one order, and the thread that sends them."""

    name: str
    waiting: deque[Event] = field(default_factory=deque)
    status: Event | None = None
    """The run's newest status, which goes before all that waits."""
    thread: threading.Thread | None = None
    away: bool = False

    @property
    def events(self) -> list[Event]:
        """All that waits."""
        return [*([] if self.status is None else [self.status]), *self.waiting]

    def next_batch(self) -> list[Event]:
        """What to send next: it stays here until it is sent. Nothing where nothing waits."""
        if self.status is not None:
            return [self.status]
        if self.waiting and "key" in self.waiting[0]:
            return list(islice(takewhile(lambda event: "key" in event, self.waiting), METRICS_A_REQUEST))
        return list(islice(self.waiting, 1))

    def remove(self, batch: list[Event]) -> None:
        """Takes out what was sent; a status that was set meanwhile stays."""
        if "status" not in batch[0]:
            for _ in batch:
                self.waiting.popleft()
        elif self.status is batch[0]:
            self.status = None


class Tracker:
    """Logs to one run without ever making its caller wait for, or fail with, the server.

    Every call writes to the record, queues and returns. Two daemon threads send, one the values and one the artifacts,
    so that neither the run's status nor its metrics wait for a file: the status goes before all else, and a file that
    fails goes behind the other files. They retry for as long as the server is away. What it will never take
    (:mod:`arplus.tracking.refusal`) is given up at once. That and what the queue's bound leaves out is lost for the
    server alone: it is counted, said in one warning a kind and again by :meth:`close`, and the record has it all.

    Nothing is sent before the first call, so that attaching to a run (after a worker's restart, say) works while the
    server is down. A point of a step that an earlier tracker of the run has sent is left out, but with ``repeats``.
    """

    def __init__(
        self,
        run: RunRef,
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
        self._given_up: list[Event] = []
        self._values = _Lane("MLflow")
        self._files = _Lane("MLflow's artifact store")
        self._changed = threading.Condition()
        self._deadline: float | None = None  # set by close(): when to stop trying
        self._closed = False
        self._said: set[str] = set()
        self._prepare_record()

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Logs metrics at ``step`` (examples trained on)."""
        repeats = {"repeats": True} if self._repeats else {}
        self._put(*({"key": k, "value": float(v), "step": int(step)} | repeats for k, v in metrics.items()))

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

    def note_failure(self, error: Exception) -> None:
        """Says on the run's page why it failed."""
        self.set_tags({"failure.reason": brief(error)})

    def mark(self, status: Status) -> None:
        """Sets the run's status at once, for a process that may not live until :meth:`close`, which may set another."""
        self._put({"status": status})

    def close(self, status: Status | None = None, timeout: float = 30.0) -> int:
        """Sends what waits, for ``timeout`` seconds at most, and ends the run as ``status``; None leaves it as it is.

        For files that wait there is more time, by :data:`_BYTES_A_SECOND`. Gives the number of events that did not
        reach the server. Calling it again changes nothing.
        """
        if self._closed:
            return self.dropped
        if status is not None:
            self._put({"status": status})
        with self._changed:
            self._closed = True
            timeout += sum(map(_bytes, self._files.waiting)) / _BYTES_A_SECOND
            self._deadline = time.monotonic() + timeout
            self._changed.notify_all()
        for lane in (self._values, self._files):
            if lane.thread is not None:
                lane.thread.join(max(self._deadline - time.monotonic(), 0))
        with self._changed:
            late = [*self._values.events, *self._files.events]
            self.dropped += len(late)
            missing = titles(self._given_up + late)
        if self.dropped:
            logger.warning(
                "MLflow (%s) lacks %d logged values%s; send them with: python -m arplus.tracking replay %s --mlflow %s",
                redact(self.run.uri),
                self.dropped,
                missing and f" ({missing})",
                shlex.quote(self._kept()),
                shlex.quote(redact(self.run.uri)),
            )
        return self.dropped

    @classmethod
    def beside(cls, run: RunRef, folder: str) -> Self:
        """Of a run or a study, whose record is in its ``folder``: a temporary one, kept there, where that is remote."""
        return cls(run, record=record_of(run, folder), keep=keep_of(folder))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, Exception):
            self.note_failure(error)
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
            except (ArplusError, OSError) as error:
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

    def _put(self, *events: Event) -> None:
        assert not self._closed, "the tracker is closed"
        if not events:
            return
        head = {"run_id": self.run.run_id, "timestamp": time.time_ns() // 1_000_000}
        full = [head | event for event in events]
        with self._changed:
            with self._record_errors(), open(self.record, "a", encoding="utf-8") as file:
                file.write("".join(json.dumps(event, ensure_ascii=False) + "\n" for event in full))
            lane = self._files if "artifact" in events[0] else self._values
            if "status" in events[0]:
                lane.status = full[0]  # the one before it, if it was not sent yet, is of no use
            elif len(self._values.waiting) + len(self._files.waiting) + len(full) <= self._capacity:
                lane.waiting.extend(full)
            else:
                self.dropped += len(full)
                self._say_once("the queue to MLflow is full: values go to %s only", self.record)
            self._changed.notify_all()
            if lane.thread is None:
                lane.thread = threading.Thread(target=self._send_all, args=(lane,), name="mlflow", daemon=True)
                lane.thread.start()

    def _send_all(self, lane: _Lane) -> None:
        client = None
        known: dict[str, set[int]] = {}
        wait, first, since = 1.0, None, 0.0

        def deliver(events: list[Event]) -> None:
            if new := events if self._repeats or "key" not in events[0] else without_repeats(client, events, known):
                send(client, new)

        while batch := self._next_batch(lane):
            if batch[0] is not first:
                first, since = batch[0], time.monotonic()
            try:
                client = client or make_client(self.run.uri)
                refused = send_each(batch, deliver)
            except Exception as error:  # whatever a server or a network may do, training goes on
                # A server that answers takes the values behind it, perhaps; one that is away would take none.
                answers = status_of(error) not in (None, *_AWAY)
                stuck = answers and "key" not in first and time.monotonic() - since > _GIVE_UP_S
                if not (stuck and lane is self._values) and not is_final(error):
                    self._wait(lane, error, wait)
                    wait = min(2 * wait, _LONGEST_WAIT_S)
                    continue
                refused = [(event, error) for event in batch]
            wait = 1.0
            self._note_sent(lane, batch, refused)

    def _next_batch(self, lane: _Lane) -> list[Event]:
        """The events to send next; none when the tracker is closed and done."""
        with self._changed:
            while not lane.next_batch() and not self._closed:
                self._changed.wait()
            return [] if self._past_deadline() else lane.next_batch()

    def _wait(self, lane: _Lane, error: Exception, seconds: float) -> None:
        """Waits for a server that is away; half a second where the tracker is closed, which wakes this up."""
        with self._changed:
            if not lane.away:
                lane.away = True
                logger.warning("%s does not answer, trying again: %s", lane.name, brief(error))
            if lane is self._files:
                lane.waiting.rotate(-1)
            # Not just wait(): each call of log() notifies, and must not wake an impatient retry.
            if self._changed.wait_for(lambda: self._closed, timeout=seconds):
                self._changed.wait(timeout=0.5)

    def _note_sent(self, lane: _Lane, batch: list[Event], refused: Refused) -> None:
        with self._changed:
            lane.remove(batch)
            self.dropped += len(refused)
            self._given_up += [event for event, _ in refused]
            if lane.away and len(refused) < len(batch):
                lane.away = False
                logger.warning("%s answers again; %d values wait", lane.name, len(lane.events))
        for event, error in refused:
            kind = f"{lane.name} {kind_of(error)}"
            if kind not in self._said:
                self._said.add(kind)
                logger.warning(
                    "%s does not take the %s: %s; %s. It stays in the record %s, and so do others that are "
                    "refused for the same reason; the rest is sent",
                    lane.name,
                    title(event),
                    brief(error),
                    advice(error),
                    self.record,
                )

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
