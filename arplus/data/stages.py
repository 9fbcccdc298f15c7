"""What the workers of the preparation do: the tasks that :mod:`arplus.data.prepare` strings together.

Each takes and returns little: sessions lie in staged shards (one Arrow file a block of input), hashes and encoded
examples pass through Ray's object store, and the driver sees counts, vocabularies and ids of duplicates.
"""

import gc
import gzip
import json
from collections import Counter
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.feather as feather
import pyarrow.parquet as pq
import ray
from numpy.typing import NDArray

from arplus import storage
from arplus.config import PrepareConfig
from arplus.data import examples
from arplus.data.duplicates import SPLITS, Boundaries, duplicate_ids, lowest, partition, split_hash
from arplus.data.sessions import DUPLICATE_KEYS, RejectedLine, code_points, hash_words, parse_block
from arplus.text import PERSONA_KEYS, Vocabulary

ROW_GROUP_ROWS = 8192
"""Examples a row group: what the feed reads at once."""
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    "use_byte_stream_split": True,  # small ids: the upper bytes are runs of zeros. Smaller and faster than the rest
    "write_statistics": False,
}
"""How examples are written: 105 bytes each; a dictionary took 119 and a third more time."""
MAX_REJECT_BYTES = 1 << 20
"""A longer rejected line is kept up to here, and says so."""

PARSED_SCHEMA = pa.schema(
    [
        ("facts", pa.string()),  # JSON of Shard
        ("ids", pa.large_binary()),  # int64 of each session
        *((key, pa.large_binary()) for key in DUPLICATE_KEYS),  # 16 bytes a session
    ]
)
"""What the parse stage returns for a block: one row, 56 bytes a session."""


@dataclass(frozen=True)
class Shard:
    """A block of input after parsing."""

    file: int
    first_line: int
    uri: str
    """Where its sessions are staged; empty without sessions."""
    problem: str | None
    """Why the file cannot be read any further, for the user."""
    counts: dict[str, int]
    """As in :class:`arplus.data.sessions.ParsedBlock`."""
    rejected: dict[str, int]
    """Rejected lines by reason."""


@dataclass
class Counts:
    """What vocabularies and manifest need to know of the sessions that stay."""

    sessions: NDArray[np.int64]
    """By split, in the order of :data:`SPLITS`."""
    characters: NDArray[np.int64]
    """By code point, of the training sessions."""
    persona_words: Counter[str] = field(default_factory=Counter)
    """Of the training sessions' profiles."""


@dataclass
class WrittenFile:
    """A file of encoded examples."""

    path: str
    """Below the data set's folder."""
    rows: int
    row_groups: list[int]
    digest: str
    """Of its rows in order, whatever their encoding."""

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {"path": self.path, "rows": self.rows, "row_groups": self.row_groups, "digest": self.digest}


def parse_blocks(batch: pa.Table, *, config: PrepareConfig, files: list[str], staging: str, rejects: str) -> pa.Table:
    """Parses blocks of lines, stages their sessions, keeps their rejects; one row of :data:`PARSED_SCHEMA` each."""
    rows = []
    gc.disable()  # millions of small objects and no cycles: collection took a third of the time
    for i in range(batch.num_rows):
        file, line = batch["file"][i].as_py(), batch["first_line"][i].as_py()
        parsed = parse_block(batch["lines"][i].as_py(), file=file, first_line=line, duplicate_key=config.duplicate_key)
        name = f"{file:06d}-{line:012d}"
        shard = Shard(
            file=file,
            first_line=line,
            uri=storage.join(staging, f"{name}.arrow") if len(parsed.sessions) else "",
            problem=batch["problem"][i].as_py(),
            counts=dict(parsed.counts),
            rejected=dict(Counter(reject.reason for reject in parsed.rejects)),
        )
        if shard.uri:
            write_shard(shard.uri, parsed.sessions)
        if parsed.rejects:
            storage.write_bytes(storage.join(rejects, f"{name}.jsonl.gz"), _rejects(files[file], parsed.rejects))
        ids = parsed.sessions["id"].to_numpy().tobytes()
        rows.append([json.dumps(shard.__dict__), ids, *(parsed.hashes[key] for key in DUPLICATE_KEYS)])
    gc.enable()
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=PARSED_SCHEMA)


@ray.remote(num_cpus=0)
def shard_facts(block: pa.Table) -> list[Shard]:
    """The facts of a parsed block, without its hashes."""
    return [Shard(**json.loads(facts)) for facts in block["facts"].to_pylist()]


@ray.remote
def scatter(partitions: int, *blocks: pa.Table) -> Any:
    """For each partition and definition of a duplicate: the hashes in it, their ids, and what decides the split."""
    parts: list[dict[str, tuple[NDArray[Any], ...]]] = [{} for _ in range(partitions)]
    ids = np.concatenate([np.frombuffer(v.as_py(), np.int64) for b in blocks for v in b["ids"]])
    splits = split_hash(hash_words(b"".join(v.as_py() for b in blocks for v in b["dialogue"])))
    for key in DUPLICATE_KEYS:
        hashes = hash_words(b"".join(v.as_py() for b in blocks for v in b[key]))
        place = partition(hashes, partitions)
        for p in range(partitions):
            here = place == p
            parts[p][key] = (hashes[here], ids[here], splits[here])
    return tuple(parts) if partitions > 1 else parts[0]


@dataclass
class Deduplicated:
    """One partition of the hashes after deduplication."""

    duplicates: dict[str, int]
    """By each definition."""
    removed: NDArray[np.int64]
    """Ids of the duplicates by the chosen one."""
    valid: NDArray[np.uint64]
    test: NDArray[np.uint64]
    """As from :func:`arplus.data.duplicates.lowest`, of the sessions that stay."""


@ray.remote
def deduplicate(config: PrepareConfig, *pieces: dict[str, tuple[NDArray[Any], ...]]) -> Deduplicated:
    """Finds the duplicates of one partition by every definition."""
    counts: dict[str, int] = {}
    for key in DUPLICATE_KEYS:
        hashes = np.concatenate([piece[key][0] for piece in pieces])
        ids = np.concatenate([piece[key][1] for piece in pieces])
        repeated = duplicate_ids(hashes, ids)
        counts[key] = len(repeated)
        if key == config.duplicate_key:
            removed = repeated
            splits = np.concatenate([piece[key][2] for piece in pieces])[~np.isin(ids, repeated)]
    valid, test = lowest(splits, valid=config.valid, test=config.test)
    return Deduplicated(counts, removed, valid, test)


@ray.remote
def count(shards: list[str], removed: NDArray[np.int64], boundaries: Boundaries) -> Counts:
    """Counts sessions by split, and characters and persona words of the training sessions.

    Characters are those of all utterances (uncut) and of all profiles. Words are gender, place and tags of every
    profile; each key counts once a profile.
    """
    total = Counts(np.zeros(len(SPLITS), np.int64), np.zeros(0x110000, np.int64))
    for uri in shards:
        sessions, split = read_survivors(uri, removed, boundaries)
        total.sessions += np.bincount(split, minlength=len(SPLITS))
        train = sessions.filter(pa.array(split == 0)).combine_chunks()
        profiles = pc.list_flatten(train["profiles"]).combine_chunks()
        words = pc.list_flatten(profiles)
        for text in (pc.list_flatten(train["utterances"]).combine_chunks(), words):
            total.characters += np.bincount(code_points(text)[0], minlength=0x110000)
        values = pc.value_counts(words)
        total.persona_words.update(dict(zip(values.field(0).to_pylist(), values.field(1).to_pylist(), strict=True)))
        total.persona_words.update(dict.fromkeys(PERSONA_KEYS, len(profiles)))
    del total.persona_words[""]
    return total


@ray.remote
def encode(
    config: PrepareConfig,
    shards: list[str],
    removed: NDArray[np.int64],
    boundaries: Boundaries,
    characters: Vocabulary,
    persona_words: Vocabulary,
    parts: dict[str, int],
) -> Any:
    """Encodes shards: the pairs left out by reason, then the examples of every part of every split, packed."""
    left_out: Counter[str] = Counter()
    pieces: list[list[pa.Table]] = [[] for _ in range(sum(parts.values()))]
    first_part = np.cumsum([0, *parts.values()])
    parts_of = np.array(list(parts.values()), np.uint64)
    for uri in shards:
        sessions, session_split = read_survivors(uri, removed, boundaries)
        encoded = examples.encode_sessions(
            sessions,
            characters,
            persona_words,
            max_utterance_characters=config.max_utterance_characters,
            max_context_utterances=config.max_context_utterances,
            incomplete_personas=config.incomplete_personas,
        )
        left_out.update(encoded.left_out)
        split = session_split[encoded.session]
        ids = encoded.table["example_id"].to_numpy().astype(np.uint64)
        # Equal ranges of the 63-bit ids: which part an example is in depends on nothing but its id.
        place = first_part[split] + (((ids >> np.uint64(31)) * parts_of[split]) >> np.uint64(32)).astype(np.int64)
        order = np.argsort(place, kind="stable")
        ends = np.cumsum(np.bincount(place, minlength=len(pieces)))
        table = encoded.table.take(pa.array(order))
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            pieces[i].append(table.slice(start, end - start))
    return left_out, *(_pack(pa.concat_tables(piece)) for piece in pieces)


@ray.remote
def write_part(output: str, split: str, part: int, *pieces: bytes) -> WrittenFile | None:
    """Sorts the examples of a part by id and writes them as one Parquet file; None where there are none."""
    table = pa.concat_tables([_unpack(piece) for piece in pieces])
    if not len(table):
        return None
    order = np.argsort(table["example_id"].to_numpy(), kind="stable")
    table = table.combine_chunks().take(pa.array(order)).combine_chunks()
    path = f"{split}/part-{part:05d}.parquet"
    filesystem, target = storage.resolve(storage.join(output, path))
    if "://" not in output:
        filesystem.create_dir(target.rsplit("/", 1)[0])
    pq.write_table(table, target, filesystem=filesystem, row_group_size=ROW_GROUP_ROWS, **PARQUET_OPTIONS)
    starts = range(0, len(table), ROW_GROUP_ROWS)
    groups = [min(ROW_GROUP_ROWS, len(table) - start) for start in starts]
    return WrittenFile(path, len(table), groups, digest(table))


def digest(table: pa.Table) -> str:
    """Digest of a table's rows (:data:`arplus.data.examples.SCHEMA`), the same however they lie in memory."""
    total = blake2b(digest_size=16)
    total.update(table["example_id"].to_numpy().astype("<i8").tobytes())
    for name in examples.LIST_COLUMNS:
        column = table[name].combine_chunks()
        total.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        total.update(column.flatten().to_numpy().astype("<i4", copy=False).data)
    return total.hexdigest()


def read_survivors(uri: str, removed: NDArray[np.int64], boundaries: Boundaries) -> tuple[pa.Table, NDArray[np.int8]]:
    """The staged sessions of a shard that are no duplicates, and the split of each."""
    filesystem, path = storage.resolve(uri)
    with filesystem.open_input_file(path) as file:
        sessions = feather.read_table(file)
    ids = sessions["id"].to_numpy()
    first, last = np.searchsorted(removed, [ids[0], ids[-1] + 1])
    if first < last:
        sessions = sessions.filter(pa.array(~np.isin(ids, removed[first:last])))
    return sessions, boundaries.assign(split_hash(hash_words(sessions["dialogue_hash"])))


def write_shard(uri: str, sessions: pa.Table) -> None:
    """Stages a shard's sessions."""
    filesystem, path = storage.resolve(uri)
    with filesystem.open_output_stream(path) as stream:
        feather.write_feather(sessions, stream, compression="lz4")


def _rejects(file: str, rejects: list[RejectedLine]) -> bytes:
    lines = []
    for reject in rejects:
        fields = {"file": file, "line": reject.line + 1, "reason": reject.reason}
        raw = reject.raw[:MAX_REJECT_BYTES]
        if len(raw) < len(reject.raw):
            fields["bytes_left_out"] = len(reject.raw) - len(raw)
        lines.append(orjson.dumps({**fields, "raw": raw.decode(errors="backslashreplace")}))
    return gzip.compress(b"\n".join(lines) + b"\n", compresslevel=6, mtime=0)


def _pack(table: pa.Table) -> bytes:
    """A table as compressed bytes: a third of its size in the object store."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def _unpack(data: bytes) -> pa.Table:
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()
