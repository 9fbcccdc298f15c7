"""Files by URI: local paths and ``s3://`` through pyarrow's file systems.

S3 takes endpoint, region, credentials and more from AWS's variables and profiles (:mod:`arplus.s3`). A file appears
whole or not at all: local files are written under a temporary name and renamed; an S3 object exists only once its
upload is complete.

A file system's error becomes one of ours, which names the URI: a lack of space or of the server is a
:class:`~arplus.errors.ResourceError`, S3's refusal a :class:`~arplus.errors.RefusedError`, the rest a
:class:`~arplus.errors.UsageError`. The first two may pass by themselves, and whoever has much to lose waits for that
with :func:`with_retries`.
"""

import errno
import functools
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from urllib.parse import quote, unquote
from uuid import uuid4

import pyarrow as pa
from pyarrow import fs

from arplus import s3
from arplus.errors import NO_CREDENTIALS, RefusedError, ResourceError, UsageError, mask

P = ParamSpec("P")
T = TypeVar("T")

log = logging.getLogger(__name__)

_REFUSED = re.compile(
    r"AWS Error \w*(ACCESS_DENIED|SIGNATURE|INVALID_|TOKEN|CLIENT|NO_SUCH_BUCKET|SKEWED)|HTTP status (30\d|40[0134])"
)
"""S3's errors that the user's settings cause, as a rule; every other one means no answer, overload, ….

Overload comes as ACCESS_DENIED too (ray-project/ray#55055), and as a token that the metadata server did not give.
"""

PATIENCE_S = 600.0
"""Seconds for which S3 may be away before a job ends: a server that restarts, a network that is down, throttling."""
PATIENCE_WITH_REFUSALS_S = 60.0
"""Seconds for which it may refuse what it allowed before."""
_LONGEST_PAUSE_S = 15.0


class _MissingError(UsageError):
    """There is no such file."""


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """The file system of ``uri`` and the path in it.

    Raises :class:`UsageError` for a scheme that is not supported, for S3 without a bucket, for a URI with keys, and for
    a name that is not UTF-8, which pyarrow cannot take.
    """
    if not uri or "\0" in uri:
        raise UsageError(f"{uri!r}: is empty or holds a NUL byte; give a local path or an s3:// URI")
    if not is_utf8(uri):
        raise UsageError(f"{mask(printable(uri))}: the name is not UTF-8; rename it")
    scheme = _scheme(uri)
    if scheme == "s3":
        path = _s3_path(uri)
        return s3.file_system(), path
    if scheme == "file":
        return fs.LocalFileSystem(), str(Path(_file_path(uri)))
    if not scheme:
        try:
            return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
        except RuntimeError as error:  # ~user, who does not exist
            raise UsageError(f"{uri}: {error}") from None
    raise UsageError(f"{mask(uri)}: only local paths and s3:// URIs are supported")


def _file_path(uri: str) -> str:
    """The path that a ``file:`` address names: it is an URL (RFC 8089), so what is escaped in it is unescaped here.

    A plain path is not a URL and is taken as it is.
    """
    rest = uri[len("file:") :]
    host, slash, path = rest[2:].partition("/") if rest.startswith("//") else ("", rest[:1], rest[1:])
    if slash != "/" or host.lower() not in ("", "localhost"):
        raise UsageError(f"{mask(uri)}: must be file:///PATH, an absolute path on this machine")
    if odd := re.search("[?#]|%(?![0-9A-Fa-f]{2})", path):
        raise UsageError(f"{mask(uri)}: write {quote(odd[0])} for {odd[0]} in a file: address, or give the plain path")
    try:
        path = unquote(path, errors="strict")
    except UnicodeDecodeError:
        path = "\0"
    if "\0" in path:
        raise UsageError(f"{mask(uri)}: is not UTF-8 or holds a NUL byte; give the plain path of a file")
    return f"/{path}"


def resolve_lasting(uri: str) -> tuple[fs.FileSystem, str]:
    """As :func:`resolve`, for what keeps the file system for long or pickles it: no keys are in it."""
    filesystem, path = resolve(uri)
    return (s3.lasting_file_system() if _scheme(uri) == "s3" else filesystem), path


def _s3_path(uri: str) -> str:
    """Bucket and key."""
    path = uri.partition("://")[2].rstrip("/")
    if mask(uri) != uri:
        raise UsageError(f"{mask(uri)}: {NO_CREDENTIALS}")
    bucket = path.partition("/")[0]
    if not bucket:  # pyarrow takes "s3://" for a folder of all buckets
        raise UsageError(f"{uri}: names no bucket; write s3://BUCKET/PATH")
    if not re.fullmatch("[A-Za-z0-9._-]{1,255}", bucket):
        raise UsageError(f"{uri}: {bucket!r} is not a bucket's name; write s3://BUCKET/PATH")
    if has_empty_part(path):
        raise UsageError(f"{uri}: holds //, /./ or /../, which are names in S3, not folders; leave them out")
    return path


def has_empty_part(path: str) -> bool:
    """Whether a path in S3 holds ``//``, ``.`` or ``..``: names to boto3, folders to pyarrow."""
    return any(part in ("", ".", "..") for part in path.split("/"))


def is_local(uri: str) -> bool:
    """Whether ``uri`` is on this machine's file system."""
    return _scheme(uri) in ("", "file")


def _scheme(uri: str) -> str:
    """The scheme in small letters; "" for a local path. No urlsplit: a key or path may hold ``#`` and ``?``."""
    match = re.match("([A-Za-z][A-Za-z0-9+.-]*):", uri)
    return match[1].lower() if match else ""


def absolute(uri: str) -> str:
    """``uri`` as every process of a cluster understands it: local paths become absolute."""
    return f"s3://{_s3_path(uri)}" if _scheme(uri) == "s3" else resolve(uri)[1]


def join(uri: str, *parts: str) -> str:
    """``uri`` with path components added: names as they are, which a ``file:`` address holds escaped."""
    return "/".join(
        [uri.rstrip("/"), *((quote(os.fsencode(part)) for part in parts) if _scheme(uri) == "file" else parts)]
    )


def beside(uri: str, name: str) -> str:
    """A file or folder of that name beside ``uri``, or in a bucket that is one by itself."""
    head, slash, _ = uri.rstrip("/").rpartition("/")
    return join(uri, name) if head.endswith("/") else f"{head}{slash}{name}"


def within(uri: str, folder: str) -> bool:
    """Whether ``uri`` is the folder or lies in it, by whatever names of it: relative ones, ``file://``, links."""
    inner, outer = (os.path.realpath(resolve(u)[1]) if is_local(u) else resolve(u)[1] for u in (uri, folder))
    return f"{inner}/".startswith(f"{outer.rstrip('/')}/")


def exists(uri: str) -> bool:
    """Whether a file or folder is there."""
    filesystem, path = resolve(uri)
    with translate_errors(uri):
        return filesystem.get_file_info(path).type != fs.FileType.NotFound


def is_utf8(uri: str) -> bool:
    """Whether a name can be encoded: Python holds the odd bytes of one that is not UTF-8 as surrogates."""
    return uri.isascii() or not re.search("[\ud800-\udfff]", uri)


def printable(name: str) -> str:
    """A file's name for people: what is not UTF-8 and what cannot be printed is escaped."""
    name = os.fsencode(name).decode("utf-8", "backslashreplace")
    return name if name.isprintable() else ascii(name)[1:-1]


def list_files(uri: str, *, missing_ok: bool = False) -> list[str]:
    """URIs of all files below a folder, or of the one file, in the order of their names.

    Links are followed. Raises :class:`UsageError` where there is nothing, unless that is ``missing_ok``.
    """
    filesystem, path = resolve(uri)
    with translate_errors(uri):
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.File:
            return [uri]
        if info.type == fs.FileType.NotFound:
            if missing_ok:
                return []
            raise UsageError(f"{uri}: no such file or folder")
        if is_local(uri):
            files = _list_local(path, ())
        else:
            files = [f.path for f in filesystem.get_file_info(fs.FileSelector(path, recursive=True)) if f.is_file]
    below = f"{path.rstrip('/')}/"
    return [join(uri, file.removeprefix(below)) for file in sorted(files)]


def _list_local(folder: str, above: tuple[str, ...]) -> list[str]:
    """All files below a folder; a link to a folder ``above`` it would have no end.

    pyarrow's own listing fails at a name that is not UTF-8, and leaves a link to nowhere out without a word.
    """
    real = os.path.realpath(folder)
    if real in above:
        return []
    found: list[str] = []
    with translate_errors(printable(folder)), os.scandir(folder) as entries:
        for entry in entries:
            found += _list_local(entry.path, (*above, real)) if os.path.isdir(entry.path) else [entry.path]
    return found


def read_bytes(uri: str) -> bytes:
    """The content of a file. Raises :class:`UsageError` where there is none."""
    filesystem, path = resolve(uri)
    with translate_errors(uri), filesystem.open_input_file(path) as file:
        return bytes(file.read())


def size(uri: str) -> int:
    """Bytes of a file. Raises :class:`UsageError` where there is none."""
    return int(_file(uri).size)


def version(uri: str) -> str:
    """What is another once a file is written anew. Raises :class:`UsageError` where there is none."""
    file = _file(uri)
    return f"{file.size} bytes of {file.mtime_ns} ns"


def _file(uri: str) -> fs.FileInfo:
    filesystem, path = resolve(uri)
    with translate_errors(uri):
        info = filesystem.get_file_info(path)
    if info.type != fs.FileType.File:
        raise UsageError(f"{uri}: no such file")
    return info


def read_range(uri: str, start: int, size: int) -> bytes:
    """``size`` bytes of a file from ``start`` on. Raises :class:`UsageError` where there is none."""
    filesystem, path = resolve(uri)
    with translate_errors(uri), filesystem.open_input_file(path) as file:
        return bytes(file.read_at(size, start))


def write_bytes(uri: str, data: bytes) -> None:
    """Writes a file whole or not at all, making its folder where needed."""
    filesystem, path = resolve(uri)
    with translate_errors(uri):
        _write(filesystem, path, data)


def check_writable(uri: str) -> None:
    """Raises :class:`UsageError` or :class:`ResourceError` where :func:`write_bytes` would; what is there stays."""
    filesystem, path = resolve(uri)
    probe = f"{path}.{uuid4().hex[:8]}.tmp"
    with translate_errors(uri):
        if filesystem.get_file_info(path).type == fs.FileType.Directory:
            raise UsageError(f"{uri}: is a folder; name a file")
        _write(filesystem, probe, b"")
        filesystem.delete_file(probe)


def _write(filesystem: fs.FileSystem, path: str, data: bytes) -> None:
    if isinstance(filesystem, fs.S3FileSystem):
        with filesystem.open_output_stream(path, compression=None) as stream:  # ".gz" is our business
            stream.write(data)
    else:
        _write_local(Path(path), data)


def _write_local(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def find_bytes(uri: str) -> bytes | None:
    """The content of a file; None where there is no such file. A request less than asking first."""
    try:
        return read_bytes(uri)
    except _MissingError:
        return None


def parse_json(data: bytes, uri: str) -> Any:
    """The value that a JSON file holds. Raises :class:`UsageError` where it is broken."""
    try:
        return json.loads(data)
    except ValueError as error:
        raise UsageError(f"{uri}: not valid JSON ({error})") from None


def read_json(uri: str) -> Any:
    """The value that a JSON file holds. Raises :class:`UsageError` where it is missing or broken."""
    return parse_json(read_bytes(uri), uri)


def write_json(uri: str, value: Any) -> None:
    """Writes a value as readable JSON."""
    write_bytes(uri, as_json(value).encode())


def as_json(value: Any) -> str:
    """A value as readable JSON: the text of a file."""
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def delete(uri: str) -> None:
    """Removes a file, or a folder with all that is in it; nothing happens where there is none."""
    filesystem, path = resolve(uri)
    with translate_errors(uri):
        info = filesystem.get_file_info(path)
        if info.type == fs.FileType.Directory:
            filesystem.delete_dir(path)
        elif info.type == fs.FileType.File:
            filesystem.delete_file(path)


def with_retries(uri: str, work: Callable[P, T], *arguments: P.args, **named: P.kwargs) -> T:
    """The result of ``work``, called with the arguments again and again while the server of ``uri`` fails.

    The pauses grow. It ends after :data:`PATIENCE_S` seconds, or :data:`PATIENCE_WITH_REFUSALS_S` where the server
    refuses, with what ``work`` raised last. For work on what has answered before: whoever has only just typed an
    address is to hear at once that it is wrong. A local disk does not get better by waiting.

    Ray Data's own list (``DataContext.retried_io_errors``) does not come into it: all reading and writing is ours.
    """
    began, pause = time.monotonic(), 0.5
    while True:
        try:
            return work(*arguments, **named)
        except (RefusedError, ResourceError) as error:
            patience = PATIENCE_WITH_REFUSALS_S if isinstance(error, RefusedError) else PATIENCE_S
            if is_local(uri) or time.monotonic() + pause > began + patience:
                raise
            log.warning("trying again in %.1f s: %s", pause, error)
        time.sleep(pause)
        pause = min(2 * pause, _LONGEST_PAUSE_S)


def patient(work: Callable[Concatenate[str, P], T], uri: str) -> Callable[P, T]:
    """``work`` on ``uri`` as a function of its other arguments, which goes :func:`with_retries`."""
    return cast(Callable[P, T], functools.partial(with_retries, uri, work, uri))


@contextmanager
def translate_errors(uri: str) -> Iterator[None]:
    """Turns a file system's errors into our own, which name ``uri`` and say what to look at; see the module."""
    try:
        yield
    except FileNotFoundError:
        raise _MissingError(f"{uri}: no such file") from None
    except (OSError, pa.ArrowInvalid) as error:
        reason = getattr(error, "strerror", None) or str(error)
        if not is_local(uri):
            refused = isinstance(error, pa.ArrowInvalid) or _REFUSED.search(reason)
            away = RefusedError if refused else ResourceError
            raise away(f"{uri}: S3 refused or did not answer; check {s3.SETTINGS} ({reason})") from error
        kind = ResourceError if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) else UsageError
        raise kind(f"{uri}: {reason}") from error
