"""Files of JSON lines as blocks of whole lines: the Ray Data source of the preparation.

A gzip stream cannot be split, so a file is read by one task, which streams it, cuts it at line ends into blocks of
some megabytes and leaves all parsing to others. Each block is one row, so Ray Data never cuts it.
"""

import io
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from gzip import BadGzipFile
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
from isal import igzip, isal_zlib
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from arplus import storage
from arplus.data.dataset import MANIFEST
from arplus.data.lease import FILE as LEASE
from arplus.data.records import MAX_LINE_BYTES
from arplus.errors import ResourceError, UserError

BLOCK_BYTES = 16 << 20
"""Bytes of lines a block: some 45,000 records."""

RANGE_BYTES = 8 << 20
"""Bytes of a file that are asked for at once."""
MAX_REJECT_BYTES = 1 << 20
"""A longer rejected line is kept up to here, and says so."""

SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".json", ".txt") for packed in ("", ".gz", ".zst"))
"""File names that are read from a folder."""

SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # which of the input files
        ("first_line", pa.int64()),  # number of the block's first line, from 0
        ("lines", pa.large_binary()),  # the lines with their ends
        ("left_out", pa.int64()),  # as in Block
        ("read", pa.int64()),  # as in Block
        ("problem", pa.string()),  # why reading stops here, for the user; null where all is well
        ("resources", pa.bool_()),  # whether that is a lack of resources
    ]
)
"""The columns of a block."""


def input_files(uri: str) -> list[str]:
    """The record files of a folder in order of their names, or the one file. Raises :class:`UserError` for none.

    What a dot or an underscore hides is left out, and so are prepared data sets below the folder, unfinished ones too.
    """
    found = storage.list_files(uri)
    if found == [uri]:
        return found
    paths = [file.removeprefix(storage.join(uri, "")) for file in found]
    prepared = tuple(f"{path.rpartition('/')[0]}/" for path in paths if path.endswith((f"/{MANIFEST}", f"/{LEASE}")))
    files = [
        file
        for file, path in zip(found, paths, strict=True)
        if path.endswith(SUFFIXES)
        and not path.startswith(prepared)
        and not any(part.startswith((".", "_")) for part in path.split("/"))
    ]
    if not files:
        raise UserError(f"{uri}: no record file in this folder; expected names that end in {', '.join(SUFFIXES)}")
    return files


class Block(NamedTuple):
    """A piece of a file."""

    lines: bytes
    """Whole lines with their ends; or the start of one that is too long."""
    left_out: int
    """Bytes of that line that are left out; 0 for whole lines."""
    read: int
    """Bytes of the file, as it is stored, that have been read so far."""


def read_blocks(uri: str, block_bytes: int = BLOCK_BYTES) -> Iterator[Block]:
    """The content of a file in blocks of whole lines, at least ``block_bytes`` each but for the last.

    Plain, gzip and Zstandard files are told apart by their first bytes. A line of more than
    :data:`~arplus.data.records.MAX_LINE_BYTES` comes alone and without its end. Raises :class:`UserError` for a
    stream that is cut short or damaged.
    """
    with RangeReader(uri) as raw:
        head = raw.peek(4)
        stream: Any = raw
        if not head and uri.endswith((".gz", ".zst")):  # even nothing, compressed, is some bytes
            kind = "gzip" if uri.endswith(".gz") else "zstd"
            raise UserError(f"{uri}: the {kind} stream is cut short or damaged (it is empty); copy the file again")
        if head.startswith(b"\x1f\x8b"):
            stream = igzip.IGzipFile(fileobj=raw)
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        try:
            for lines, left_out in _cut_at_lines(stream, block_bytes):
                yield Block(lines, left_out, raw.tell())
        except (EOFError, zlib.error, isal_zlib.error, BadGzipFile) as error:  # type: ignore[misc]
            raise UserError(f"{uri}: the gzip stream is cut short or damaged ({error}); copy the file again") from None
        except OSError as error:
            if stream is raw or ("zstd" not in str(error).lower() and "truncated" not in str(error).lower()):
                raise
            raise UserError(f"{uri}: the zstd stream is cut short or damaged ({error}); copy the file again") from None


class RangeReader(io.RawIOBase):
    """A file read in order, in large ranges, the next one while the last one is used.

    A range that S3 fails to give is asked for again (:func:`arplus.storage.patiently`), so a server that is
    away for a while costs time, not the job.
    """

    def __init__(self, uri: str, range_bytes: int = RANGE_BYTES):
        self._uri = uri
        self._size = storage.patiently(uri, lambda: storage.size(uri))
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
    return storage.patiently(uri, lambda: storage.read_range(uri, start, size)) if size else b""


def _cut_at_lines(stream: BinaryIO, block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole lines, each with 0; or the start of a line that is too long and how many bytes it lacks."""
    whole: list[bytes] = []  # ends with a line's end
    size = 0
    tail: list[bytes] = []  # the start of a line
    tail_size = left_out = 0
    while chunk := stream.read(max(1, min(block_bytes, 4 << 20))):
        if left_out:
            end = chunk.find(b"\n")
            if end < 0:
                left_out += len(chunk)
                continue
            yield tail.pop(), left_out + end
            tail_size = left_out = 0
            chunk = chunk[end + 1 :]
        cut = chunk.rfind(b"\n") + 1
        if cut:
            whole += [*tail, chunk[:cut]]
            size += tail_size + cut
            tail, tail_size, chunk = [], 0, chunk[cut:]
        if whole and (size >= block_bytes or tail_size + len(chunk) > MAX_LINE_BYTES):
            yield b"".join(whole), 0
            whole, size = [], 0
        if chunk:
            tail.append(chunk)
            tail_size += len(chunk)
        if tail_size > MAX_LINE_BYTES:
            tail = [b"".join(tail)[:MAX_REJECT_BYTES]]
            left_out = tail_size - MAX_REJECT_BYTES
    if left_out:
        yield tail.pop(), left_out
    elif whole or tail:
        yield b"".join(whole + tail), 0


class LinesDatasource(Datasource):
    """Ray Data source of :data:`SCHEMA` blocks: one task a file, one row a block.

    A damaged stream does not fail the task (Ray would try again): its problem comes as the file's last row.
    """

    def __init__(self, uris: list[str], block_bytes: int = BLOCK_BYTES):
        super().__init__()
        self._uris = uris
        self._block_bytes = block_bytes

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown: the files are compressed."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[ReadTask]:
        """One task a file, in the order of the files, whatever parallelism Ray Data suggests."""
        return [
            ReadTask(
                partial(_read_file, index, uri, self._block_bytes),
                BlockMetadata(num_rows=None, size_bytes=None, input_files=(uri,), exec_stats=None),
                schema=SCHEMA,
                per_task_row_limit=per_task_row_limit,
            )
            for index, uri in enumerate(self._uris)
        ]


def _read_file(index: int, uri: str, block_bytes: int) -> Iterator[pa.Table]:
    line = 0
    block = None
    try:
        for block in read_blocks(uri, block_bytes):
            lines = block.lines
            if not line and lines.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no part of the first record
                lines = lines[3:]
            yield _row(index, line, lines, block.left_out, block.read, None)
            line += 1 if block.left_out else lines.count(b"\n") + (not lines.endswith(b"\n"))
        if block is None:  # an empty file is a row too: Ray Data's own empty block would have no columns
            yield _row(index, 0, b"", 0, 0, None)
    except UserError as error:
        yield _row(index, line, b"", 0, 0, error)


def _row(index: int, line: int, lines: bytes, left_out: int, read: int, error: UserError | None) -> pa.Table:
    problem = None if error is None else str(error)
    columns = [[index], [line], [lines], [left_out], [read], [problem], [isinstance(error, ResourceError)]]
    return pa.table(columns, schema=SCHEMA)
