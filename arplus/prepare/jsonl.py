"""Files of JSON lines as blocks of whole lines: where the preparation begins.

A gzip stream cannot be split, so a file is read by one task, which streams it, cuts it at line ends into blocks of
some megabytes and leaves all parsing to others. Each block is one row, so Ray Data never cuts it.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pyarrow as pa

from arplus.data.records import MAX_LINE_BYTES
from arplus.errors import ArplusError, ResourceError, UsageError
from arplus.prepare import archives, kinds

BLOCK_BYTES = 16 << 20
"""Bytes of lines per block: some 45,000 records."""
MAX_REJECT_BYTES = 1 << 20
"""A longer rejected line is kept up to here, and says so."""
HEAD_BYTES = 1 << 12
"""What a file is, is looked for in so many bytes."""

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

    A line ends with LF, CR LF or CR alone, which becomes one LF. A line of more than
    :data:`~arplus.data.records.MAX_LINE_BYTES` comes alone and without its end. Raises :class:`UsageError` for a stream
    that is cut short or damaged, and for a file that holds no text.
    """
    with archives.opened(uri) as file:
        at_start = True
        for lines, left_out in _cut_at_lines(_line_feeds(file, max(1, min(block_bytes, 4 << 20))), block_bytes):
            if at_start and (problem := kinds.no_text(lines[:HEAD_BYTES], uri, file.packing)):
                raise UsageError(f"{uri}: {problem}")
            at_start = False
            yield Block(lines, left_out, file.tell())


def _line_feeds(file: archives.File, size: int) -> Iterator[bytes]:
    """The content of a file in pieces of at most ``size`` bytes, with LF for every end of a line."""
    held = b""  # a CR whose LF may follow in the next piece
    while piece := file.read(size):
        piece = held + piece
        held = piece[-1:] if piece.endswith(b"\r") else b""
        piece = piece[: len(piece) - len(held)]
        if b"\r" in piece:
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if piece:
            yield piece
    if held:
        yield b"\n"


def _cut_at_lines(pieces: Iterator[bytes], block_bytes: int) -> Iterator[tuple[bytes, int]]:
    """Blocks of whole lines, each with 0; or the start of a line that is too long and how many bytes it lacks."""
    whole: list[bytes] = []  # ends with a line's end
    size = 0
    tail: list[bytes] = []  # the start of a line
    tail_size = left_out = 0
    for chunk in pieces:
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


def read_files(numbers: pa.Table, *, uris: list[str], block_bytes: int) -> Iterator[pa.Table]:
    """Reads the files whose numbers are in the column ``item``, as blocks of :data:`SCHEMA`, one row per block.

    A damaged stream does not fail the task (Ray would try again): its problem comes as the file's last row.
    """
    for number in numbers["item"].to_pylist():
        yield from _read_file(number, uris[number], block_bytes)


def _read_file(index: int, uri: str, block_bytes: int) -> Iterator[pa.Table]:
    line = 0
    block = None
    try:
        for block in read_blocks(uri, block_bytes):
            lines = block.lines
            if not line and lines.startswith(b"\xef\xbb\xbf"):  # a byte order mark is not part of the first record
                lines = lines[3:]
            yield _row(index, line, lines, block.left_out, block.read, None)
            line += 1 if block.left_out else lines.count(b"\n") + (not lines.endswith(b"\n"))
        if block is None:  # an empty file is a row too: Ray Data's own empty block would have no columns
            yield _row(index, 0, b"", 0, 0, None)
    except ArplusError as error:
        yield _row(index, line, b"", 0, 0, error)


def _row(index: int, line: int, lines: bytes, left_out: int, read: int, error: ArplusError | None) -> pa.Table:
    problem = None if error is None else str(error)
    columns = [[index], [line], [lines], [left_out], [read], [problem], [isinstance(error, ResourceError)]]
    return pa.table(columns, schema=SCHEMA)
