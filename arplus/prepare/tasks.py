"""What the workers of the preparation do: the tasks that :mod:`arplus.prepare.pipeline` strings together.

Each takes and returns little: sessions lie in staged shards (one Arrow file a block of input), hashes and encoded
examples pass through Ray's object store, and the driver sees counts, vocabularies and ids of duplicates.
"""

import gc
import gzip
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc
import ray
from numpy.typing import NDArray

from arplus import storage
from arplus.config import PrepareConfig
from arplus.data.sessions import DUPLICATE_KEYS, LINE_BITS, RejectedLine, code_points, hash_words, parse_block
from arplus.errors import ArplusError, ResourceError
from arplus.prepare import statistics
from arplus.prepare.duplicates import Boundaries, duplicate_ids, lowest, membership, partition, split_hash
from arplus.prepare.jsonl import MAX_REJECT_BYTES
from arplus.prepare.shards import Shard, Staged, read_survivors, write, write_shard
from arplus.text import PERSONA_KEYS

PARSED_SCHEMA = pa.schema(
    [
        ("facts", pa.string()),  # JSON of Shard
        ("ids", pa.large_binary()),  # int64 of each session
        *((key, pa.large_binary()) for key in DUPLICATE_KEYS),  # 16 bytes a session
    ]
)
"""What the parse stage returns for a block: one row, 56 bytes a session."""


@dataclass
class CorpusCounts:
    """What vocabularies, card and manifest need to know of the sessions that stay."""

    sessions: NDArray[np.int64]
    """By split, evaluation sets last."""
    characters: NDArray[np.int64]
    """By code point, of the training sessions."""
    persona_words: Counter[str]
    """Of the training sessions' profiles."""
    histograms: statistics.Histograms
    """Of the sessions of the input."""

    def __add__(self, other: "CorpusCounts") -> "CorpusCounts":
        return CorpusCounts(
            self.sessions + other.sessions,
            self.characters + other.characters,
            self.persona_words + other.persona_words,
            {name: self.histograms[name] + other.histograms[name] for name in self.histograms},
        )


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
        parsed = parse_block(
            block["lines"],
            file=file,
            first_line=line,
            duplicate_key=config.duplicate_key,
            left_out=block["left_out"],
        )
        uri = storage.join(staging, f"{name}.arrow") if len(parsed.sessions) else ""
        problem, resources = block["problem"], block["resources"]
        try:
            if uri:
                write_shard(uri, parsed.sessions)
            if parsed.rejects:
                write(storage.join(rejects, f"{name}-{token}.jsonl.gz"), _rejects(files[file], parsed.rejects))
        except ArplusError as error:
            problem, resources = str(error), isinstance(error, ResourceError)
        shard = Shard(
            file=file,
            first_line=line,
            read=block["read"],
            uri=uri,
            problem=problem,
            resources=resources,
            counts=dict(parsed.counts),
            rejected=dict(Counter(reject.reason for reject in parsed.rejects)),
        )
        ids = parsed.sessions["id"].to_numpy().tobytes()
        rows.append([json.dumps(shard.__dict__), ids, *(parsed.hashes[key] for key in DUPLICATE_KEYS)])
    gc.enable()
    return pa.table([list(column) for column in zip(*rows, strict=True)], schema=PARSED_SCHEMA)


@ray.remote(num_cpus=0)
def shard_facts(block: pa.Table) -> list[Shard]:
    """The facts of a parsed block, without its hashes."""
    return [Shard(**json.loads(facts)) for facts in block["facts"].to_pylist()]


@ray.remote
def evaluation_hashes(files: int, *blocks: pa.Table) -> NDArray[np.uint64]:
    """Dialogue hashes [n, 2] of the sessions of evaluation sets, and the number [n] of the file of each, in columns.

    The first ``files`` files are those of the input; the blocks of the others are few. Rows are in order of files,
    in whatever order the blocks come.
    """
    found = [np.empty((0, 3), np.uint64)]
    for block in blocks:
        for ids, hashes in zip(block["ids"], block["dialogue"], strict=True):
            file = np.frombuffer(ids.as_py(), np.int64) >> LINE_BITS
            columns = np.column_stack([hash_words(hashes.as_py()), file.astype(np.uint64)])
            found.append(columns[file >= files])
    rows = np.concatenate(found)
    return rows[np.argsort(rows[:, 2], kind="stable")]


@ray.remote
def scatter(
    config: PrepareConfig, partitions: int, files: int, evaluation: NDArray[np.uint64], *blocks: pa.Table
) -> Any:
    """For each partition and definition of a duplicate the hashes of the input's sessions, 16 bytes each.

    By the chosen definition also ids, what decides the split, and the row of ``evaluation``
    (:func:`evaluation_hashes`) that has the same dialogue (-1 for none). The input's are the first ``files`` files.
    """
    parts: list[dict[str, tuple[NDArray[Any], ...]]] = [{} for _ in range(partitions)]
    ids = np.concatenate([np.frombuffer(v.as_py(), np.int64) for b in blocks for v in b["ids"]])
    ours = ids < files << LINE_BITS
    for key in DUPLICATE_KEYS:
        columns: list[NDArray[Any]] = [hash_words(b"".join(v.as_py() for b in blocks for v in b[key]))[ours]]
        place = partition(columns[0], partitions)
        if key == config.duplicate_key:
            dialogues = hash_words(b"".join(v.as_py() for b in blocks for v in b["dialogue"]))[ours]
            columns += [ids[ours], split_hash(dialogues), membership(dialogues, evaluation[:, :2])]
        for p in range(partitions):
            here = place == p
            parts[p][key] = tuple(column[here] for column in columns)
    return tuple(parts) if partitions > 1 else parts[0]


@dataclass
class Deduplicated:
    """One partition of the hashes after deduplication."""

    duplicates: dict[str, int]
    """By each definition."""
    removed: NDArray[np.int64]
    """Ids of the duplicates by the chosen one, in rising order."""
    overlapping: NDArray[np.int64]
    """Ids of the others whose dialogue is in an evaluation set."""
    twins: NDArray[np.int64]
    """For each of these the row of the evaluation sets' hashes."""
    valid: NDArray[np.uint64]
    test: NDArray[np.uint64]
    """As from :func:`arplus.prepare.duplicates.lowest`, of the sessions that stay."""


@ray.remote
def deduplicate(config: PrepareConfig, *pieces: dict[str, tuple[NDArray[Any], ...]]) -> Deduplicated:
    """Finds the duplicates of one partition by every definition, and what overlaps with the evaluation sets."""
    counts: dict[str, int] = {}
    for key in DUPLICATE_KEYS:
        hashes, *others = (np.concatenate(column) for column in zip(*(piece[key] for piece in pieces), strict=True))
        if key != config.duplicate_key:
            counts[key] = len(duplicate_ids(hashes, np.arange(len(hashes))))
            continue
        ids, splits, twins = others
        removed = duplicate_ids(hashes, ids)
        counts[key] = len(removed)
        stays = ~np.isin(ids, removed)
        overlaps = stays & (twins >= 0)
        valid, test = lowest(splits[stays & ~overlaps], valid=config.valid, test=config.test)
    return Deduplicated(counts, removed, ids[overlaps], twins[overlaps], valid, test)


@ray.remote
def count(shards: list[Staged], removed: NDArray[np.int64], boundaries: Boundaries, splits: int) -> CorpusCounts:
    """Counts sessions by split, draws histograms, and counts characters and persona words of the training sessions.

    Characters are those of all utterances (uncut) and of all profiles. Words are gender, place and tags of every
    profile; each key counts once a profile. ``splits`` is the number of splits, evaluation sets included.
    """
    total = CorpusCounts(np.zeros(splits, np.int64), np.zeros(0x110000, np.int64), Counter(), statistics.empty())
    for shard in shards:
        sessions, split = read_survivors(shard, removed, boundaries)
        total.sessions += np.bincount(split, minlength=splits)
        if shard.split is not None:
            continue
        sessions = sessions.combine_chunks()
        statistics.add(total.histograms, statistics.histograms(sessions))
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


def _rejects(file: str, rejects: list[RejectedLine]) -> bytes:
    lines = []
    for reject in rejects:
        fields = {"file": file, "line": reject.line + 1, "reason": reject.reason}
        raw = reject.raw[:MAX_REJECT_BYTES]
        if left_out := reject.left_out + len(reject.raw) - len(raw):
            fields["bytes_left_out"] = left_out
        lines.append(orjson.dumps({**fields, "raw": raw.decode(errors="backslashreplace")}))
    return gzip.compress(b"\n".join(lines) + b"\n", compresslevel=6, mtime=0)
