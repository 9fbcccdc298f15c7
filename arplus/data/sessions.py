"""Sessions as Arrow columns: how a block of lines is parsed and staged, and how flat strings become code points."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal, NamedTuple, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from arplus.data.records import HASH_BYTES, MAX_LINE_BYTES, Reject, Session, parse_line
from arplus.text import VARIATION_SELECTOR

DuplicateKey = Literal["exact_record", "dialogue_and_profiles", "dialogue"]
"""What can make two records duplicates of each other."""
DUPLICATE_KEYS: tuple[DuplicateKey, ...] = get_args(DuplicateKey)

LINE_BITS = 40
"""A session's id is ``file << LINE_BITS | line``: the order of ids is the order of the input."""

_LINE_FEED, _TAB = ord("\n"), ord("\t")

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.binary(HASH_BYTES)),  # hash of what makes it a duplicate
        ("dialogue_hash", pa.binary(HASH_BYTES)),  # decides the split
        ("utterances", pa.list_(pa.string())),
        ("speakers", pa.list_(pa.int32())),  # one profile number an utterance
        ("profiles", pa.list_(pa.list_(pa.string()))),  # gender, place, tags of each
        ("has_reference", pa.bool_()),  # whether the last utterance is a test record's reference reply
    ]
)
"""Columns of staged sessions."""


class RejectedLine(NamedTuple):
    """A line that is no session, where it stands, and why."""

    line: int
    reason: str
    raw: bytes
    left_out: int = 0
    """Bytes at its end that are not in ``raw``."""


@dataclass
class ParsedBlock:
    """What became of a block of lines."""

    sessions: pa.Table
    """:data:`SCHEMA`; the ids are in rising order."""
    hashes: dict[DuplicateKey, bytes]
    """Of every session by each definition of a duplicate, 16 bytes each, in the order of ``sessions``."""
    rejects: list[RejectedLine]
    counts: Counter[str] = field(default_factory=Counter)
    """`records`, `sessions`, `blank_lines` (no records), `uid_missing` (sessions whose speakers were assumed); and
    `tags_left_out` and `words_cut` of the sessions' profiles, as in :class:`arplus.data.records.Profile`."""


def parse_block(
    lines: bytes, *, file: int, first_line: int, duplicate_key: DuplicateKey, left_out: int = 0
) -> ParsedBlock:
    """Parses every line of a block, with LF at its end; ``first_line`` is the number of its first one in the file.

    With ``left_out`` the block is the start of one line that is too long, without that many bytes at its end.
    """
    sessions: list[Session] = []
    numbers: list[int] = []
    exact: list[bytes] = []
    rejects: list[RejectedLine] = []
    counts: Counter[str] = Counter()
    if left_out:
        rejects, lines = [RejectedLine(first_line, "line_too_long", lines, left_out)], b""
    for number, line in enumerate(lines.removesuffix(b"\n").split(b"\n") if lines else (), first_line):
        if len(line) > MAX_LINE_BYTES:
            rejects.append(RejectedLine(number, "line_too_long", line))
            continue
        result = parse_line(line)
        if type(result) is Session:
            sessions.append(result)
            numbers.append(number)
            exact.append(blake2b(line, digest_size=HASH_BYTES).digest())
        elif not line.strip():
            counts["blank_lines"] += 1
        else:
            assert type(result) is Reject
            rejects.append(RejectedLine(number, result.reason, line))
    hashes: dict[DuplicateKey, bytes] = {
        "exact_record": b"".join(exact),
        "dialogue_and_profiles": b"".join([s.record_hash for s in sessions]),
        "dialogue": b"".join([s.dialogue_hash for s in sessions]),
    }
    counts["records"] = len(sessions) + len(rejects)
    counts["sessions"] = len(sessions)
    counts["uid_missing"] = sum([s.uid_missing for s in sessions])
    counts["tags_left_out"] = sum([p.tags_left_out for s in sessions for p in s.profiles])
    counts["words_cut"] = sum([p.words_cut for s in sessions for p in s.profiles])
    ids = (np.asarray(numbers, dtype=np.int64) | (file << LINE_BITS)) if numbers else np.empty(0, np.int64)
    return ParsedBlock(to_table(sessions, ids, hashes[duplicate_key]), hashes, rejects, counts)


def to_table(sessions: list[Session], ids: NDArray[np.int64], keys: bytes) -> pa.Table:
    """Sessions as :data:`SCHEMA` columns; ``keys`` are their hashes, one after the other."""
    if not sessions:
        return SCHEMA.empty_table()
    speakers = [s.speakers for s in sessions]
    turns = [len(who) for who in speakers]
    utterances, _ = _cut("\n".join([s.dialogue for s in sessions]).replace(VARIATION_SELECTOR, ""))
    profiles = [s.profiles for s in sessions]
    words, ends = _cut("\n".join([p.text for each in profiles for p in each]))
    return pa.Table.from_arrays(
        [
            pa.array(ids, pa.int64()),
            _binary(keys),
            _binary(b"".join([s.dialogue_hash for s in sessions])),
            _lists(turns, utterances),
            _lists(turns, pa.array(np.fromiter(itertools.chain.from_iterable(speakers), np.int32, sum(turns)))),
            _lists([len(each) for each in profiles], pa.ListArray.from_arrays(np.append(0, ends), words)),
            pa.array([s.has_reference for s in sessions]),
        ],
        schema=SCHEMA,
    )


def _cut(text: str) -> tuple[pa.StringArray, NDArray[np.int32]]:
    """The strings between the line feeds and tabs of a text, and after how many of them each line ends."""
    raw = np.frombuffer(text.encode(), np.uint8)
    separator = (raw == _LINE_FEED) | (raw == _TAB)
    ends = np.append(np.flatnonzero(separator), len(raw))
    line_ends = np.append(raw[ends[:-1]] == _LINE_FEED, True)
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(ends))
    strings = pa.StringArray.from_buffers(len(ends), pa.py_buffer(offsets), pa.py_buffer(raw[~separator]))
    return strings, (np.flatnonzero(line_ends) + 1).astype(np.int32)


def hash_words(hashes: bytes | pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hashes as pairs of 64-bit words, shape [rows, 2]."""
    if not isinstance(hashes, bytes):
        hashes = b"".join(np.frombuffer(c.buffers()[1], f"V{HASH_BYTES}", len(c), c.offset * HASH_BYTES).tobytes()
                          for c in hashes.chunks)  # fmt: skip
    return np.frombuffer(hashes, dtype="<u8").reshape(-1, 2)


def code_points(strings: pa.Array) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """All code points of a string array in a row, and where each string starts (one offset more than strings)."""
    if not len(strings):
        return np.empty(0, np.uint32), np.zeros(1, np.int64)
    _, offset_buffer, data = strings.buffers()
    offsets = np.frombuffer(offset_buffer, np.int32)[strings.offset : strings.offset + len(strings) + 1].astype(
        np.int64
    )
    raw = np.frombuffer(data or b"", np.uint8)[offsets[0] : offsets[-1]]
    points = np.frombuffer(raw.tobytes().decode().encode("utf-32-le"), np.uint32)
    if len(points) == len(raw):
        return points, offsets - offsets[0]
    first_bytes = np.zeros(len(raw) + 1, np.int64)
    np.cumsum((raw & 0xC0) != 0x80, out=first_bytes[1:])
    return points, first_bytes[offsets - offsets[0]]


def _lists(lengths: list[int], values: pa.Array) -> pa.ListArray:
    offsets = np.zeros(len(lengths) + 1, np.int32)
    np.cumsum(np.asarray(lengths, np.int32), out=offsets[1:])
    return pa.ListArray.from_arrays(offsets, values)


def _binary(hashes: bytes) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(HASH_BYTES), len(hashes) // HASH_BYTES, [None, pa.py_buffer(hashes)])
