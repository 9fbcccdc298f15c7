"""Sessions as Arrow columns: how a block of lines is parsed and staged, and how flat strings become code points."""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from arplus.config.jobs import DuplicateKey
from arplus.data.hashes import HASH_BYTES, hash_column
from arplus.data.ragged import list_column, offsets
from arplus.data.records import MAX_LINE_BYTES, Reject, Session, parse_line
from arplus.text import VARIATION_SELECTOR

DUPLICATE_KEYS: tuple[DuplicateKey, ...] = get_args(DuplicateKey)
"""What can make two records duplicates of each other."""

LINE_BITS = 40
"""A session's id is ``file << LINE_BITS | line``: the order of ids is the order of the input."""

_LINE_FEED, _TAB = ord("\n"), ord("\t")

SCHEMA = pa.schema(
    [
        ("id", pa.int64()),
        ("key", pa.binary(HASH_BYTES)),  # hash of what makes it a duplicate
        ("dialogue_hash", pa.binary(HASH_BYTES)),  # decides the split
        ("utterances", pa.list_(pa.string())),
        ("speakers", pa.list_(pa.int32())),  # one profile number per utterance
        ("profiles", pa.list_(pa.list_(pa.string()))),  # gender, place, tags of each
        ("has_reference", pa.bool_()),  # whether the last utterance is a test record's reference reply
    ]
)
"""Columns of staged sessions."""


class RejectedLine(NamedTuple):
    """A line that is not a session, where it stands, and why."""

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
    lines: bytes, file: int, first_line: int, duplicate_key: DuplicateKey, left_out: int = 0
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
    turns = np.array([len(who) for who in speakers])
    utterances, _ = _cut("\n".join([s.dialogue for s in sessions]).replace(VARIATION_SELECTOR, ""))
    profiles = [s.profiles for s in sessions]
    words, ends = _cut("\n".join([p.text for each in profiles for p in each]))
    columns = [
        pa.array(ids, pa.int64()),
        hash_column(keys),
        hash_column(b"".join([s.dialogue_hash for s in sessions])),
        list_column(utterances, turns),
        list_column(pa.array(np.fromiter(itertools.chain.from_iterable(speakers), np.int32, turns.sum())), turns),
        list_column(list_column(words, np.diff(ends, prepend=0)), np.array([len(each) for each in profiles])),
        pa.array([s.has_reference for s in sessions]),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


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


def code_points(strings: pa.Array) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
    """All code points of a string array in a row, and where each string starts (one offset more than strings)."""
    if not len(strings):
        return np.empty(0, np.uint32), np.zeros(1, np.int64)
    _, offset_buffer, data = strings.buffers()
    starts = np.frombuffer(offset_buffer, np.int32)[strings.offset : strings.offset + len(strings) + 1].astype(np.int64)
    raw = np.frombuffer(data or b"", np.uint8)[starts[0] : starts[-1]]
    points = np.frombuffer(raw.tobytes().decode().encode("utf-32-le"), np.uint32)
    starts -= starts[0]
    return points, starts if len(points) == len(raw) else offsets((raw & 0xC0) != 0x80)[starts]
