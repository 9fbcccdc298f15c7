"""Files of JSON lines as blocks of whole lines: the Ray Data source of the preparation.

A gzip stream cannot be split, so a file is read by one task, which streams it, cuts it at line ends into blocks of
some megabytes and leaves all parsing to others. Each block is one row, so Ray Data never cuts it.
"""

import zlib
from collections.abc import Iterator
from functools import partial
from gzip import BadGzipFile
from typing import Any, BinaryIO

import pyarrow as pa
from isal import igzip, isal_zlib
from ray.data import Datasource
from ray.data.block import BlockMetadata
from ray.data.datasource import ReadTask

from arplus import storage
from arplus.errors import UserError

BLOCK_BYTES = 16 << 20
"""Bytes of lines a block: some 45,000 records."""

SUFFIXES = tuple(kind + packed for kind in (".jsonl", ".json", ".txt") for packed in ("", ".gz", ".zst"))
"""File names that are read from a folder."""

SCHEMA = pa.schema(
    [
        ("file", pa.int32()),  # which of the input files
        ("first_line", pa.int64()),  # number of the block's first line, from 0
        ("lines", pa.large_binary()),  # the lines with their ends
        ("problem", pa.string()),  # why reading stops here, for the user; null where all is well
    ]
)
"""The columns of a block."""


def input_files(uri: str) -> list[str]:
    """The record files of a folder in order of their names, or the one file. Raises :class:`UserError` for none."""
    found = storage.list_files(uri)
    if found == [uri]:
        return found
    files = [f for f in found if f.endswith(SUFFIXES) and not f.rsplit("/", 1)[-1].startswith((".", "_"))]
    if not files:
        raise UserError(f"{uri}: no record file in this folder; expected names that end in {', '.join(SUFFIXES)}")
    return files


def read_blocks(uri: str, block_bytes: int = BLOCK_BYTES) -> Iterator[bytes]:
    """The content of a file in blocks of whole lines, at least ``block_bytes`` each but for the last.

    Plain, gzip and Zstandard files are told apart by their first bytes. Raises :class:`UserError` for a stream that
    is cut short or damaged.
    """
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_stream(path, compression=None) as raw:
        head = raw.read(4)
    with filesystem.open_input_stream(path, compression=None) as raw:
        stream: Any = raw
        if head.startswith(b"\x1f\x8b"):
            stream = igzip.IGzipFile(fileobj=raw)
        elif head == b"\x28\xb5\x2f\xfd":
            stream = pa.CompressedInputStream(raw, "zstd")
        try:
            yield from _cut_at_lines(stream, block_bytes)
        except (EOFError, zlib.error, isal_zlib.error, BadGzipFile) as error:  # type: ignore[misc]
            raise UserError(f"{uri}: the gzip stream is cut short or damaged ({error}); copy the file again") from None
        except OSError as error:
            if stream is raw or ("zstd" not in str(error).lower() and "truncated" not in str(error).lower()):
                raise
            raise UserError(f"{uri}: the zstd stream is cut short or damaged ({error}); copy the file again") from None


def _cut_at_lines(stream: BinaryIO, block_bytes: int) -> Iterator[bytes]:
    parts: list[bytes] = []
    size = 0
    while chunk := stream.read(max(1, min(block_bytes, 4 << 20))):
        cut = chunk.rfind(b"\n") + 1
        if cut and size + cut >= block_bytes:
            yield b"".join([*parts, chunk[:cut]])
            parts, size = [], 0
            chunk = chunk[cut:]
        parts.append(chunk)
        size += len(chunk)
    if size:
        yield b"".join(parts)


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
            if not line and block.startswith(b"\xef\xbb\xbf"):  # a byte order mark is no part of the first record
                block = block[3:]
            yield _row(index, line, block, None)
            line += block.count(b"\n") + (not block.endswith(b"\n"))
        if block is None:  # an empty file is a row too: Ray Data's own empty block would have no columns
            yield _row(index, 0, b"", None)
    except UserError as error:
        yield _row(index, line, b"", str(error))


def _row(index: int, line: int, block: bytes, problem: str | None) -> pa.Table:
    return pa.table([[index], [line], [block], [problem]], schema=SCHEMA)
