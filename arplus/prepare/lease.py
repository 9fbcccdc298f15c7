"""One preparation at a time per output: a small JSON file in the output says who works there and until when.

The holder renews it from a thread; one that is not renewed for :data:`LIFETIME` seconds is free to be taken, and one
whose process has ended on this machine at once. It is written as it was read (:mod:`arplus.claims`), so exactly one of
several jobs wins it; a store that cannot do so is refused.

The lease also marks an output as unfinished: it is removed only after the manifest is written.
"""

import json
import logging
import os
import socket
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil

from arplus import claims, storage
from arplus.errors import ArplusError, UsageError

FILE = "_lease.json"
"""Name of the lease in the output."""
LIFETIME = 60.0
"""Seconds after its last renewal at which a lease runs out."""

log = logging.getLogger(__name__)


class _HeldError(Exception):
    """The lease is another's."""

    def __init__(self, entry: dict[str, Any]):
        self.entry = entry


class Lease:
    """The right to write to an output; made by :meth:`take`, given back by :meth:`release`."""

    def __init__(self, output: str, lifetime: float):
        self.token = uuid4().hex[:8]
        """Names this preparation's files, so that no other one can take them for its own."""
        self._output = output
        self._uri = storage.join(storage.absolute(output), FILE)
        self._lifetime = lifetime
        self._lost = ""
        self._renewed = time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def take(cls, output: str, lifetime: float = LIFETIME) -> "Lease":
        """The lease on an output. Raises :class:`UsageError` that names the holder while another one is alive."""
        lease = cls(output, lifetime)
        other = lease._write(lease._entry(), take=True)
        if other is not None:
            until = datetime.fromtimestamp(other["expires"]).astimezone().isoformat(" ", "seconds")
            raise UsageError(
                f"{output}: {other['holder']} is preparing a data set there, and its lease lasts until {until} "
                "unless it is renewed; wait for that job, or choose another --output"
            )
        try:
            claims.check_conditions(lease._uri, lease._entry())
        except ArplusError:
            lease._write(None, take=True)
            raise
        lease._thread.start()
        return lease

    def check(self) -> None:
        """Raises :class:`UsageError` where another job has taken the output meanwhile."""
        if time.time() > self._renewed + self._lifetime:  # this process was held up, and its thread with it
            self._renew_now()
        if self._lost:
            raise UsageError(f"{self._output}: {self._lost} took over this output while this job was held up")

    def release(self, *, finished: bool) -> None:
        """Lets go of the output: removes the lease, or leaves it as the mark of unfinished work."""
        self._ended.set()
        self._thread.join()
        if not self._lost:
            self._write(None if finished else self._entry(ended=True))

    def _write(self, entry: bytes | None, *, take: bool = False) -> dict[str, Any] | None:
        """Writes the entry, or removes it where it is None. Another job's stays, and is given back.

        Unless it is to ``take`` one that is free. Else one that is no longer there was another's too, who has come to
        the end of its work meanwhile.
        """

        def change(data: bytes | None) -> bytes | None:
            there = _parse(data)
            if data is None and not take:
                raise _HeldError({"holder": "another job, which has ended,"})
            if there is not None and there["token"] != self.token and (not take or _is_alive(there)):
                raise _HeldError(there)
            return entry

        try:
            claims.update(self._uri, change)
        except _HeldError as error:
            return error.entry
        return None

    def _entry(self, *, ended: bool = False) -> bytes:
        entry = {
            "token": self.token,
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "expires": 0.0 if ended else time.time() + self._lifetime,
            "process": _this_process(),
        }
        return json.dumps(entry).encode()

    def _renew(self) -> None:
        while not self._lost and not self._ended.wait(self._lifetime / 4):
            self._renew_now()

    def _renew_now(self) -> None:
        began = time.time()
        try:
            other = self._write(self._entry())
        except (ArplusError, OSError) as error:  # the storage is away: nobody else can take the lease either
            log.warning("%s: the lease could not be renewed (%s)", self._output, error)
            return
        if other is not None:
            self._lost = str(other["holder"])
        else:
            self._renewed = began


def is_unfinished(output: str) -> bool:
    """Whether a preparation began in the output and has not come to its end."""
    return storage.exists(storage.join(output, FILE))


def is_lease(data: bytes) -> bool:
    """Whether a file called :data:`FILE` is ours: also one that is not yet written, or cut short by a full disk."""
    start = b'{"token": '
    return start.startswith(data[: len(start)])


def _this_process() -> list[Any] | None:
    """What tells this process from all others, anywhere and at any time; ``None`` where that cannot be known."""
    return _process(os.getpid())


def _process(pid: int) -> list[Any] | None:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid"), pid, psutil.Process(pid).create_time()]
    except (OSError, psutil.Error):
        return None


def _is_alive(entry: dict[str, Any]) -> bool:
    """Whether a lease holds: it has not run out, and its process has not ended on this machine."""
    process, ours = entry["process"], _this_process()
    if process and ours and process[:2] == ours[:2] and _process(process[2]) != process:
        return False
    return bool(entry["expires"] > time.time())


def _parse(data: bytes | None) -> dict[str, Any] | None:
    try:
        return {"token": None, "holder": "another job", "expires": 0.0, "process": None} | json.loads(data or b"")
    except (ValueError, TypeError):  # there is none, or it was cut short by a full disk
        return None
