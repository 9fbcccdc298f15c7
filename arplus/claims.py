"""Atomic changes of small shared files, local or on S3: read, change, write, and once more if another wrote first.

On S3 that is a conditional write (``If-Match``, ``If-None-Match``), of which exactly one of several succeeds. On a
local file system the file is locked meanwhile; where it has no ``flock``, a second file is the lock while it exists.

What such a file claims is its owner's matter: a data set is refused while its holder lives
(:mod:`arplus.prepare.lease`), a run or a study goes to the newest job (:mod:`arplus.runs.attempt`).
"""

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError
from botocore.exceptions import ConnectionError as NoConnectionError
from filelock import FileLock, SoftFileLock, Timeout

from arplus import s3, storage
from arplus.errors import RefusedError, ResourceError, UsageError

Change = Callable[[bytes | None], bytes | None]
"""A file's new content, for its old one; None stands for no file, on either side."""
LOCK_S = 60.0
"""Seconds to wait for a local lock, which is held for milliseconds, or for a write to S3 between those of others."""
_NO_FLOCK = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""What file systems without locks say: FUSE, NFS without a lock daemon, others."""


class UnconditionalError(UsageError):
    """The S3 store has no conditional writes."""


def update(uri: str, change: Change, *, last_wins: bool = False) -> None:
    """Replaces a file by what ``change`` makes of it, which is asked again where another process was faster.

    What ``change`` raises leaves the file as it is. Raises :class:`UnconditionalError` where the store refuses such
    writes; one that takes them and ignores their conditions is found out by :func:`check_conditions` alone. With
    ``last_wins`` either is written to all the same: of two that write at the same moment the first one's word is lost.
    """
    if storage.is_local(uri):
        _update_locked(uri, change)
        return
    began, pause = time.monotonic(), 0.0
    while not _update_unchanged(uri, change, last_wins):
        if time.monotonic() > began + LOCK_S:
            raise ResourceError(
                f"{uri}: was another at each write for {LOCK_S:g} s; unless jobs write there all the time, this store "
                "never meets the condition of a conditional write (If-Match): choose another one or a local path"
            )
        time.sleep(random.uniform(0, pause))
        pause = min(2 * pause + 0.01, 1.0)


def check_conditions(uri: str, data: bytes) -> None:
    """Raises :class:`UnconditionalError` where the store ignores conditions; the file, which holds ``data``, stays."""
    if not storage.is_local(uri):
        for condition in ({"IfNoneMatch": "*"}, {"IfMatch": '"00000000000000000000000000000000"'}):
            with _translated(uri):
                if _put(uri, data, condition):
                    raise _unconditional(uri, "ignores the conditions of")


def _update_locked(uri: str, change: Change) -> None:
    path = Path(storage.resolve(uri)[1])
    with storage.translate_errors(uri):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            data = change(path.read_bytes() if path.exists() else None)
            if data is None:
                path.unlink(missing_ok=True)
            else:
                storage.write_bytes(uri, data)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Holds the lock on a local file. Raises :class:`ResourceError` where another process holds it for a minute."""
    file, soft = path.with_name(f".{path.name}.lock"), path.with_name(f".{path.name}.held")
    lock: FileLock | SoftFileLock = FileLock(file, timeout=LOCK_S, fallback_to_soft=False)
    try:
        try:
            lock.acquire()
        except OSError as error:
            if error.errno not in _NO_FLOCK:
                raise
            file.unlink(missing_ok=True)
            lock = SoftFileLock(soft, timeout=LOCK_S)
            lock.acquire()
    except Timeout:
        raise ResourceError(
            f"{path}: another process has held its lock for {LOCK_S:g} s; if no job runs that writes there, "
            f"remove {lock.lock_file}"
        ) from None
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # whoever waits for it sees that it is gone, and makes another one
        lock.release()


def _update_unchanged(uri: str, change: Change, last_wins: bool) -> bool:
    """Whether nobody else wrote between reading and writing."""
    with _translated(uri):
        try:
            found = s3.client().get_object(**_place(uri))
            data, condition = found["Body"].read(), {"IfMatch": found["ETag"]}
        except ClientError as error:
            if error.response["Error"]["Code"] not in ("NoSuchKey", "404"):
                raise
            data, condition = None, {"IfNoneMatch": "*"}
        data = change(data)
        if data is None:
            s3.client().delete_object(**_place(uri))
            return True
        try:
            return _put(uri, data, condition)
        except UnconditionalError:
            if not last_wins:
                raise
            return _put(uri, data, {})


def _put(uri: str, data: bytes, condition: dict[str, str]) -> bool:
    """Writes the file; False where the condition is not met: it is there, or is another one by now."""
    try:
        s3.client().put_object(**_place(uri), Body=data, **condition)
        return True
    except ClientError as error:
        if _is_unknown(error):
            raise _unconditional(uri, "refuses") from error
        if _status(error) not in (404, 409, 412):
            raise
        return False


def _place(uri: str) -> dict[str, str]:
    bucket, _, key = storage.absolute(uri).removeprefix("s3://").partition("/")
    return {"Bucket": bucket, "Key": key}


def _status(error: ClientError) -> int:
    return int(error.response["ResponseMetadata"]["HTTPStatusCode"])


def _is_unknown(error: ClientError) -> bool:
    """Whether the store knows no conditions; a code, since 400 stands for much else."""
    unknown = ("NotImplemented", "NotSupported", "InvalidArgument", "InvalidRequest", "UnsupportedHeader")
    return _status(error) == 501 or (_status(error) == 400 and error.response["Error"]["Code"] in unknown)


def _unconditional(uri: str, what: str) -> UnconditionalError:
    return UnconditionalError(
        f"{uri}: this S3 store {what} conditional writes (If-None-Match, If-Match), without which two jobs could write "
        "there at once; choose another store or a local path"
    )


@contextmanager
def _translated(uri: str) -> Iterator[None]:
    """boto3's errors as those of :func:`arplus.storage.translate_errors`."""
    try:
        yield
    except (ClientError, BotoCoreError) as error:
        in_trouble = isinstance(error, ClientError) and _status(error) >= 500
        kind = ResourceError if in_trouble or isinstance(error, HTTPClientError | NoConnectionError) else RefusedError
        raise kind(f"{uri}: S3 refused or did not answer; check {s3.SETTINGS} ({error})") from error
