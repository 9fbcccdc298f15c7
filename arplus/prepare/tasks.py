"""What the workers of the preparation do: the tasks that :mod:`arplus.prepare.pipeline` strings together.

Each takes and returns little: sessions lie in staged shards (one Arrow file per block of input), hashes and encoded
examples pass through Ray's object store, and the driver sees counts, vocabularies and ids of duplicates.
"""

import gc
import gzip
import json
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from arplus import storage
from arplus.config import PrepareConfig, from_dict
from arplus.config.jobs import DuplicateKey
from arplus.data.hashes import hash_words
from arplus.data.ragged import flat
from arplus.data.sessions import DUPLICATE_KEYS, LINE_BITS, RejectedLine, code_points, parse_block
from arplus.errors import ArplusError, ResourceError
from arplus.prepare import statistics
from arplus.prepare.duplicates import Boundaries, duplicate_ids, lowest, membership, partition, split_hash
from arplus.prepare.jsonl import MAX_REJECT_BYTES
from arplus.sums import Sums
from arplus.text import PERSONA_KEYS


@dataclass(frozen=True)
class Shard:
    """A block of input after parsing."""

    file: int
    first_line: int
    read: int
    """Bytes of the file that were read so far."""
    uri: str
    """Where its sessions are staged; empty without sessions."""
    problem: str | None
    """Why the job cannot go on, for the user."""
    resources: bool
    """Whether that is a lack of resources."""
    counts: dict[str, int]
    """As in :class:`arplus.data.sessions.ParsedBlock`."""
    rejected: dict[str, int]
    """Rejected lines by reason."""


class Staged(NamedTuple):
    """Where a shard's sessions are, and what they are for."""

    uri: str
    split: int | None
    """The evaluation set's index among all splits; ``None`` where each session's dialogue decides."""


@dataclass(frozen=True)
class Survivors:
    """Which sessions stay, and in which split."""

    removed: NDArray[np.int64]
    """Ids of the others, in order."""
    boundaries: Boundaries

    def read(self, shard: Staged) -> tuple[pa.Table, NDArray[np.int8]]:
        """The staged sessions of a shard that stay, and the split of each."""
        data = storage.with_retries(shard.uri, storage.read_bytes, shard.uri)
        sessions = unpack(data)
        if shard.split is not None:
            return sessions, np.full(len(sessions), shard.split, np.int8)
        ids = sessions["id"].to_numpy()
        first, last = np.searchsorted(self.removed, [ids[0], ids[-1] + 1])
        if first < last:
            sessions = sessions.filter(pa.array(~np.isin(ids, self.removed[first:last])))
        return sessions, self.boundaries.assign(split_hash(hash_words(sessions["dialogue_hash"])))


def pack(table: pa.Table) -> bytes:
    """A table as compressed bytes: a third of its size in the object store."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression="lz4")) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def unpack(data: bytes) -> pa.Table:
    """What :func:`pack` was given."""
    return pa.ipc.open_stream(pa.BufferReader(data)).read_all()


def write(uri: str, data: pa.Buffer | bytes) -> None:
    """Writes a file of ours, with patience for storage that is away."""
    storage.with_retries(uri, storage.write_bytes, uri, data)


PARSED_SCHEMA = pa.schema(
    [
        ("facts", pa.string()),  # JSON of Shard
        ("ids", pa.large_binary()),  # int64 of each session
        *((key, pa.large_binary()) for key in DUPLICATE_KEYS),  # 16 bytes per session
    ]
)
"""What the parse stage returns for a block: one row, 56 bytes per session."""


@dataclass
class CorpusCounts(Sums):
    """What vocabularies, card and manifest need to know of the sessions that stay."""

    sessions: NDArray[np.int64]
    """By split, evaluation sets last."""
    characters: NDArray[np.int64]
    """By code point, of the training sessions."""
    persona_words: Counter[str]
    """Of the training sessions' profiles."""
    histograms: statistics.Histograms
    """Of the sessions of the input."""


def parse_blocks(
    batch: pa.Table, *, config: PrepareConfig, files: list[str], staging: str, rejects: str, token: str
) -> pa.Table:
    """Parses blocks of lines, stages their sessions, keeps their rejects; one row of :data:`PARSED_SCHEMA` each.

    Storage that fails is the block's problem: an error would reach the driver as Ray Data's, without its class.
    """
    rows = []
    gc.disable()  # millions of small objects and no cycles: collection took a third of the time
    for block in batch.to_pylist():
        file, line = block["file"], block["first_line"]
        name = f"{file:06d}-{line:012d}"
        parsed = parse_block(block["lines"], file, line, config.duplicate_key, block["left_out"])
        uri = storage.join(staging, f"{name}.arrow") if len(parsed.sessions) else ""
        problem, resources = block["problem"], block["resources"]
        try:
            if uri:
                write(uri, pack(parsed.sessions))
            if parsed.rejects:
                write(storage.join(rejects, f"{name}-{token}.jsonl.gz"), _rejects(files[file], parsed.rejects))
        except ArplusError as error:
            problem, resources = str(error), isinstance(error, ResourceError)
        rejected = dict(Counter(reject.reason for reject in parsed.rejects))
        shard = Shard(file, line, block["read"], uri, problem, resources, dict(parsed.counts), rejected)
        ids = parsed.sessions["id"].to_numpy().tobytes()
        rows.append([json.dumps(asdict(shard)), ids, *(parsed.hashes[key] for key in DUPLICATE_KEYS)])
    gc.enable()
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=PARSED_SCHEMA)


@ray.remote(num_cpus=0)
def shard_facts(block: pa.Table) -> list[Shard]:
    """The facts of a parsed block, without its hashes."""
    return [from_dict(Shard, json.loads(facts), source="a parsed block") for facts in block["facts"].to_pylist()]


@ray.remote
def evaluation_hashes(firsts: list[int], *blocks: pa.Table) -> NDArray[np.uint64]:
    """Dialogue hashes [n, 2] of the sessions of evaluation sets, and the index [n] of the set of each, in columns.

    ``firsts`` are the numbers of the sets' first files; the input's files are before them. Rows are in order of files,
    in whatever order the blocks come.
    """
    found = [np.empty((0, 3), np.uint64)]
    for block in blocks:
        for ids, hashes in zip(block["ids"], block["dialogue"], strict=True):
            file = np.frombuffer(ids.as_py(), np.int64) >> LINE_BITS
            columns = np.column_stack([hash_words(hashes.as_py()), file.astype(np.uint64)])
            found.append(columns[file >= firsts[0]])
    rows = np.concatenate(found)
    rows = rows[np.argsort(rows[:, 2], kind="stable")]
    rows[:, 2] = np.searchsorted(firsts, rows[:, 2].astype(np.int64), side="right") - 1
    return rows


@ray.remote
def scatter(
    config: PrepareConfig, partitions: int, files: int, evaluation: NDArray[np.uint64], *blocks: pa.Table
) -> Any:
    """For each partition and definition of a duplicate the hashes of the input's sessions.

    By the chosen definition also ids, what decides the split, and the evaluation set (:func:`evaluation_hashes`) that
    has the same dialogue (-1 for none), the first one. The input's are the first ``files`` files.
    """
    parts: list[dict[str, tuple[NDArray[Any], ...]]] = [{} for _ in range(partitions)]
    ids = np.concatenate([np.frombuffer(v.as_py(), np.int64) for b in blocks for v in b["ids"]])
    ours = ids < files << LINE_BITS
    sets = np.append(evaluation[:, 2].astype(np.int32), np.int32(-1))
    for key in DUPLICATE_KEYS:
        columns: list[NDArray[Any]] = [hash_words(b"".join(v.as_py() for b in blocks for v in b[key]))[ours]]
        place = partition(columns[0], partitions)
        if key == config.duplicate_key:
            dialogues = hash_words(b"".join(v.as_py() for b in blocks for v in b["dialogue"]))[ours]
            columns += [ids[ours], split_hash(dialogues), sets[membership(dialogues, evaluation[:, :2])]]
        for p in range(partitions):
            here = place == p
            parts[p][key] = tuple(column[here] for column in columns)
    return tuple(parts) if partitions > 1 else parts[0]


@dataclass
class Deduplicated:
    """One partition of the hashes after deduplication, or all of them."""

    duplicates: dict[DuplicateKey, int]
    """By each definition."""
    removed: NDArray[np.int64]
    """Ids of the duplicates by the chosen one, in rising order."""
    overlapping: NDArray[np.int64]
    """Ids of the others whose dialogue is in an evaluation set."""
    sets: NDArray[np.int32]
    """For each of these the index of the first such set."""
    valid: NDArray[np.uint64]
    test: NDArray[np.uint64]
    """As from :func:`arplus.prepare.duplicates.lowest`, of the sessions that stay."""

    @classmethod
    def together(cls, parts: list["Deduplicated"]) -> "Deduplicated":
        """All partitions."""
        arrays = ("removed", "overlapping", "sets", "valid", "test")
        whole = cls(
            {key: sum(part.duplicates[key] for part in parts) for key in DUPLICATE_KEYS},
            *(np.concatenate([getattr(part, name) for part in parts]) for name in arrays),
        )
        whole.removed.sort()
        return whole


@ray.remote
def deduplicate(config: PrepareConfig, *pieces: dict[str, tuple[NDArray[Any], ...]]) -> Deduplicated:
    """Finds the duplicates of one partition by every definition, and what overlaps with the evaluation sets."""
    counts: dict[DuplicateKey, int] = {}
    for key in DUPLICATE_KEYS:
        hashes, *others = (np.concatenate(column) for column in zip(*(piece[key] for piece in pieces), strict=True))
        if key != config.duplicate_key:
            counts[key] = len(duplicate_ids(hashes, np.arange(len(hashes))))
            continue
        ids, splits, sets = others
        removed = duplicate_ids(hashes, ids)
        counts[key] = len(removed)
        stays = ~np.isin(ids, removed)
        overlaps = stays & (sets >= 0)
        valid, test = lowest(splits[stays & ~overlaps], valid=config.valid, test=config.test)
    return Deduplicated(counts, removed, ids[overlaps], sets[overlaps], valid, test)


@ray.remote
def count(shards: list[Staged], survivors: Survivors, splits: int) -> CorpusCounts:
    """Counts sessions by split, draws histograms, and counts characters and persona words of the training sessions.

    Characters are those of all utterances (uncut) and of all profiles. Words are gender, place and tags of every
    profile; each key counts once per profile. ``splits`` is the number of splits, evaluation sets included.
    """
    total = CorpusCounts(np.zeros(splits, np.int64), np.zeros(0x110000, np.int64), Counter(), statistics.empty())
    for shard in shards:
        sessions, split = survivors.read(shard)
        total.sessions += np.bincount(split, minlength=splits)
        if shard.split is not None:
            continue
        for name, seen in statistics.histograms(sessions).items():
            total.histograms[name] += seen
        train = sessions.filter(pa.array(split == 0))
        profiles = flat(train["profiles"]).flatten()
        words = profiles.flatten()
        for text in (flat(train["utterances"]).flatten(), words):
            total.characters += np.bincount(code_points(text)[0], minlength=0x110000)
        values = pc.value_counts(words)
        total.persona_words.update(dict(zip(values.field(0).to_pylist(), values.field(1).to_pylist(), strict=True)))
        total.persona_words.update(dict.fromkeys(PERSONA_KEYS, len(profiles)))
    del total.persona_words[""]
    return total


def _rejects(file: str, rejects: list[RejectedLine]) -> bytes:
    lines = []
    for reject in rejects:
        fields = {"file": file, "line": reject.line + 1, "reason": reject.reason}
        raw = reject.raw[:MAX_REJECT_BYTES]
        if left_out := reject.left_out + len(reject.raw) - len(raw):
            fields["bytes_left_out"] = left_out
        lines.append(orjson.dumps({**fields, "raw": raw.decode(errors="backslashreplace")}))
    return gzip.compress(b"\n".join(lines) + b"\n", compresslevel=6, mtime=0)
