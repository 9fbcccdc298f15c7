"""A packed file as the bytes in it, read in order: gzip, Zstandard, bzip2 and xz, told by content, not by name.

Whatever is wrong with a stream is an error: one that is cut short, damaged, or followed by something else.
"""

import bz2
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
from isal import igzip, isal_zlib

from arplus import storage
from arplus.errors import UsageError
from arplus.prepare import kinds

RANGE_BYTES = 8 << 20
"""Bytes of a file that are asked for at once."""
XZ_MEMORY = 256 << 20
"""Bytes that unpacking an xz stream may take; xz -9 needs 65 MiB."""

_DAMAGED = (EOFError, zlib.error, isal_zlib.error, lzma.LZMAError, OSError)
_PIECE_BYTES = 1 << 18


class RangeReader(io.RawIOBase):
    """A file read in order, in large ranges, the next one while the last one is used.

    A range that S3 fails to give is asked for again (:func:`arplus.storage.with_retries`), so a server that is
    away for a while costs time, not the job.
    """

    def __init__(self, uri: str, range_bytes: int = RANGE_BYTES):
        self._uri = uri
        self._size = storage.with_retries(uri, storage.size, uri)
        self._range_bytes = range_bytes
        self._asked = self._given = 0
        self._rest = memoryview(b"")
        self._thread = ThreadPoolExecutor(1)
        self._next = self._ask()

    def _ask(self) -> Future[bytes]:
        start = self._asked
        self._asked = min(self._size, start + self._range_bytes)
        return self._thread.submit(_read_range, self._uri, start, self._asked - start)

    def _fill(self) -> None:
        if not self._rest and self._given < self._size:
            self._rest = memoryview(self._next.result())
            self._next = self._ask()

    def peek(self, size: int) -> bytes:
        """At most ``size`` of the next bytes, which stay to be read."""
        self._fill()
        return bytes(self._rest[:size])

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads at most as many bytes as the buffer takes; 0 at the end of the file."""
        self._fill()
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        self._given += size
        return size

    def tell(self) -> int:
        """How many bytes have been read."""
        return self._given

    def close(self) -> None:
        """Stops the reading ahead."""
        self._thread.shutdown(cancel_futures=True)
        super().close()


def _read_range(uri: str, start: int, size: int) -> bytes:
    data = storage.with_retries(uri, storage.read_range, uri, start, size) if size else b""
    if len(data) != size:  # it would look like the end of the file
        raise UsageError(f"{uri}: has become shorter while it was read; start again when nobody writes to it")
    return data


class File:
    """The unpacked content of a file; made by :func:`opened`."""

    def __init__(self, uri: str, raw: RangeReader):
        self._uri = uri
        self._raw = raw
        head = raw.peek(6)
        self.packing = kinds.packing(head)
        """How it is packed; ``None`` for not at all."""
        if not head and (kind := kinds.named_packing(uri)):  # even nothing, packed, is some bytes
            raise UsageError(f"{uri}: the {kind} stream is cut short or damaged (it is empty); copy the file again")
        self._stream = _stream(raw, self.packing)

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size`` of them; none at the end. Raises :class:`UsageError` for a broken stream."""
        try:
            return bytes(self._stream.read(size))
        except _DAMAGED as error:  # type: ignore[misc]  # storage's errors are none of these
            raise UsageError(f"{self._uri}: {self._problem(str(error))}") from None

    def tell(self) -> int:
        """How many bytes of the file as it is stored have been read."""
        return self._raw.tell()

    def _problem(self, reason: str) -> str:
        name = self._uri.rpartition("/")[2]
        if "too much memory" in reason:
            return (
                "its Zstandard window is larger than 128 MiB (zstd --long=28 or more), too large for this reader; "
                f"pack it again: zstd -dc --long=31 {name} | zstd -o new-{name}"
            )
        if reason == "Memory usage limit exceeded":
            return (
                f"unpacking this xz stream takes more than {XZ_MEMORY >> 20} MiB, its dictionary is too large; "
                f"pack it again: xz -dc {name} | xz -9 > new-{name}"
            )
        if "Dictionary mismatch" in reason:
            return f"it was packed with a Zstandard dictionary: zstd -dc -D DICTIONARY {name} > records.jsonl"
        return f"the {self.packing} stream is cut short or damaged ({reason}); copy the file again"


@contextmanager
def opened(uri: str) -> Iterator[File]:
    """A file of any packing, by its first bytes. Raises :class:`UsageError` for one that is not there."""
    with RangeReader(uri) as raw:
        yield File(uri, raw)


def _stream(raw: RangeReader, packing: str | None) -> Any:
    match packing:
        case "gzip":
            return igzip.IGzipFile(fileobj=raw)
        case "zstd":
            return pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        case "bzip2":
            return _Streams(raw, bz2.BZ2Decompressor)
        case "xz":
            return _Streams(raw, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY), padding=b"\0")
    return raw


class _Streams:
    """What the streams of a bzip2 or xz file hold, one after the other.

    The standard library's own files take a broken second stream for the end of the file.
    """

    def __init__(self, raw: RangeReader, decompressor: Callable[[], Any], padding: bytes = b""):
        self._raw = raw
        self._new = decompressor
        self._padding = padding
        self._stream = decompressor()
        self._given = b""

    def read(self, size: int) -> bytes:
        """The next bytes, at most ``size`` of them; none at the end of the last stream."""
        while True:
            if self._stream.eof:
                rest = self._stream.unused_data.lstrip(self._padding) if self._padding else self._stream.unused_data
                while not rest:
                    if not (piece := self._raw.read(_PIECE_BYTES)):
                        return b""
                    rest = piece.lstrip(self._padding) if self._padding else piece
                self._stream = self._new()
                piece = rest
            elif self._stream.needs_input:
                if not (piece := self._raw.read(_PIECE_BYTES)):
                    raise EOFError("it ends before its stream does")
            else:
                piece = b""
            if data := self._stream.decompress(piece, size):
                return bytes(data)
