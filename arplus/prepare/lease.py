"""One preparation an output at a time: a small JSON file in the output says who works there and until when.

The holder renews it from a thread; one that is not renewed for :data:`LIFETIME` seconds is free to be taken, and one
whose process has ended on this machine at once. On S3 taking it is a conditional write (``If-None-Match``, and
``If-Match`` for one that has run out), which exactly one of several jobs wins; a store that has none is refused. Local
files are locked meanwhile.

The lease also marks an output as unfinished: it is removed only after the manifest is written.
"""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
from botocore.exceptions import BotoCoreError, ClientError

from arplus import s3, storage
from arplus.errors import ArplusError, UsageError

FILE = "_lease.json"
"""Name of the lease in the output."""
LIFETIME = 60.0
"""Seconds after its last renewal at which a lease runs out."""

log = logging.getLogger(__name__)


class Lease:
    """The right to write to an output; made by :meth:`take`, given back by :meth:`release`."""

    def __init__(self, output: str, lifetime: float):
        self.token = uuid4().hex[:8]
        """Names this preparation's files, so that no other one can take them for its own."""
        self._output = output
        self._lifetime = lifetime
        self._file = _S3File(output) if not storage.is_local(output) else _LocalFile(output)
        self._lost = ""
        self._renewed = time.time()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)

    @classmethod
    def take(cls, output: str, lifetime: float = LIFETIME) -> "Lease":
        """The lease on an output. Raises :class:`UsageError` that names the holder while another one is alive."""
        lease = cls(output, lifetime)
        holder = lease._file.replace(lease._entry(), unless=_alive)
        if holder is not None:
            until = datetime.fromtimestamp(holder["expires"]).astimezone().isoformat(" ", "seconds")
            raise UsageError(
                f"{output}: {holder['holder']} is preparing a data set there, and its lease lasts until {until} "
                "unless it is renewed; wait for that job, or choose another --output"
            )
        try:
            lease._file.check_conditions(lease._entry())
        except ArplusError:
            lease._file.remove()
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
        if self._lost:
            return
        if finished:
            self._file.remove()
        else:
            self._file.replace({**self._entry(), "expires": 0.0}, unless=self._is_others)

    def _entry(self) -> dict[str, Any]:
        return {
            "token": self.token,
            "holder": f"process {os.getpid()} on {socket.gethostname()}",
            "expires": time.time() + self._lifetime,
            "process": _this_process(),
        }

    def _is_others(self, entry: dict[str, Any]) -> bool:
        return bool(entry.get("token") != self.token)

    def _renew(self) -> None:
        while not self._lost and not self._ended.wait(self._lifetime / 4):
            self._renew_now()

    def _renew_now(self) -> None:
        began = time.time()
        try:
            taken = self._file.replace(self._entry(), unless=self._is_others)
        except (ArplusError, OSError) as error:  # the storage is away: nobody else can take the lease either
            log.warning("%s: the lease could not be renewed (%s)", self._output, error)
            return
        if taken is not None:
            self._lost = str(taken["holder"])
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


def _alive(entry: dict[str, Any]) -> bool:
    """Whether a lease holds: it has not run out, and its process has not ended on this machine."""
    process, ours = entry.get("process"), _this_process()
    if process and ours and process[:2] == ours[:2] and _process(process[2]) != process:
        return False
    return bool(entry["expires"] > time.time())


class _LocalFile:
    """The lease on a local file system, locked while it is read and written."""

    def __init__(self, output: str):
        self._path = Path(storage.resolve(output)[1]) / FILE

    def replace(self, entry: dict[str, Any], unless: Any) -> dict[str, Any] | None:
        """Writes the entry and returns ``None``; where ``unless(old entry)`` holds, returns the old one instead."""
        with self._locked() as file:
            old = _parsed(file.read())
            if old is not None and unless(old):
                return old
            file.seek(0)
            file.truncate()
            file.write(json.dumps(entry).encode())
            file.flush()
        return None

    def check_conditions(self, entry: dict[str, Any]) -> None:
        """Nothing: a lock needs no condition."""

    def remove(self) -> None:
        with self._locked():
            self._path.unlink()

    @contextmanager
    def _locked(self) -> Iterator[Any]:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            while True:
                with open(self._path, "a+b") as file:
                    fcntl.flock(file, fcntl.LOCK_EX)
                    if self._path.exists() and os.path.samestat(os.fstat(file.fileno()), self._path.stat()):
                        file.seek(0)
                        yield file
                        return
                # Its holder removed it while we waited for the lock.
        except OSError as error:
            raise UsageError(f"{self._path.parent}: {error.strerror}") from error


class _S3File:
    """The lease on S3, written on condition that it has not changed since it was read."""

    def __init__(self, output: str):
        path = storage.absolute(output).removeprefix("s3://")
        bucket, _, folder = path.partition("/")
        self._uri = output
        self._place = {"Bucket": bucket, "Key": f"{folder}/{FILE}".lstrip("/")}

    def replace(self, entry: dict[str, Any], unless: Any) -> dict[str, Any] | None:
        """As :meth:`_LocalFile.replace`."""
        while True:
            try:
                answer = s3.client().get_object(**self._place)
                old, condition = _parsed(answer["Body"].read()), {"IfMatch": answer["ETag"]}
            except ClientError as error:
                if error.response["Error"]["Code"] not in ("NoSuchKey", "404"):
                    raise self._refused(error) from error
                old, condition = None, {"IfNoneMatch": "*"}
            except BotoCoreError as error:
                raise self._refused(error) from error
            if old is not None and unless(old):
                return old
            if self._put(entry, condition):
                return None
            # Another job was faster: look again.

    def check_conditions(self, entry: dict[str, Any]) -> None:
        """Raises :class:`UsageError` where the store ignores the condition; the lease is ours and stays."""
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"00000000000000000000000000000000"'}):
            if self._put(entry, condition):
                raise self._unconditional("ignores the conditions of")

    def _put(self, entry: dict[str, Any], condition: dict[str, str]) -> bool:
        """Writes the entry; False where the condition is not met: the file is there, or is another one by now."""
        try:
            s3.client().put_object(**self._place, Body=json.dumps(entry).encode(), **condition)
            return True
        except ClientError as error:
            if _is_unknown(error):
                raise self._unconditional("refuses") from error
            if _status(error) not in (404, 409, 412):
                raise self._refused(error) from error
            return False
        except BotoCoreError as error:
            raise self._refused(error) from error

    def _unconditional(self, what: str) -> UsageError:
        return UsageError(
            f"{self._uri}: this S3 store {what} conditional writes (If-None-Match, If-Match), without which two jobs "
            "could write there at once; choose an --output on another store or a local path"
        )

    def remove(self) -> None:
        try:
            s3.client().delete_object(**self._place)
        except (ClientError, BotoCoreError) as error:
            raise self._refused(error) from error

    def _refused(self, error: Exception) -> UsageError:
        return UsageError(f"{self._uri}: S3 refused or did not answer; check {s3.SETTINGS} ({error})")


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _is_unknown(error: ClientError) -> bool:
    """Whether the store knows no conditions; a code, since 400 stands for much else."""
    unknown = ("NotImplemented", "NotSupported", "InvalidArgument", "InvalidRequest", "UnsupportedHeader")
    return _status(error) == 501 or (_status(error) == 400 and error.response["Error"]["Code"] in unknown)


def _parsed(data: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(data)
        return {"holder": "another job", "expires": 0.0} | entry
    except (ValueError, TypeError):  # empty, or cut short by a full disk
        return None
