"""The stages of a preparation: what of each is handed to which Ray task, and the progress that the log tells of it."""

import functools
import logging
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

import ray

from arplus import storage
from arplus.cluster import connection
from arplus.config import PrepareConfig
from arplus.data.manifest import DataFile
from arplus.errors import ResourceError, UsageError
from arplus.prepare import jsonl, output, parquet, tasks
from arplus.prepare.lease import Lease
from arplus.prepare.sources import Source
from arplus.prepare.tasks import CorpusCounts, Deduplicated, Shard, Staged
from arplus.text import Vocabulary

T = TypeVar("T")

log = logging.getLogger(__name__)

EVERY = 10.0
"""Seconds between two lines of a stage's progress."""
SESSIONS_A_PARTITION = 2_000_000
"""Sessions whose hashes one deduplication task holds."""
SESSIONS_A_PART = 400_000
"""Training sessions per Parquet file, about half a million examples."""
MAX_GROUPS = 256
"""Shards are handed to count and encode in at most so many groups, which bounds the pieces of the shuffle."""

# A reader must never wait for parsers to finish nor keep them from starting, so it asks for next to nothing; and
# Ray Data fuses two stages into one process where they ask for the same.
READER_CPUS, PARSER_CPUS = 0.02, 0.9


class StageLog:
    """The progress of one stage, told in the log every :data:`EVERY` seconds."""

    def __init__(self, stage: str, unit: str):
        self._stage, self._unit = stage, unit
        self._began = self._spoke = time.monotonic()

    def update(self, items: int, share: float) -> None:
        """So many items are done, and this share of the whole stage (0 … 1), which tells the time to go."""
        now = time.monotonic()
        if now - self._spoke < EVERY or not share:
            return
        self._spoke = now
        seconds = now - self._began
        log.info(
            "%s: %d %s, %.0f per second, %.0f %% done, %.0f s to go",
            *(self._stage, items, self._unit, items / seconds, 100 * share, seconds * (1 / share - 1)),
        )

    def end(self, items: int) -> None:
        """The stage is over."""
        seconds = max(time.monotonic() - self._began, 1e-9)
        log.info("%s: %d %s in %.1f s (%.0f per second)", self._stage, items, self._unit, seconds, items / seconds)


def as_completed(refs: list[Any], progress: StageLog, items: int) -> Iterator[Any]:
    """Results of tasks in the order in which they end; all of them together do so many items."""
    total = len(refs)
    while refs:
        ready, refs = ray.wait(refs, num_returns=1)
        yield from ray.get(ready)
        done = (total - len(refs)) / total
        progress.update(round(items * done), done)


class Hashes(NamedTuple):
    """The hashes of a block's sessions."""

    ref: Any
    last_file: int
    """The number of the last file of which it has any."""


def parse(
    config: PrepareConfig, sources: list[Source], lease: Lease, block_bytes: int
) -> tuple[list[Hashes], list[Shard]]:
    """Runs read and parse; returns the hashes of each block, and what is known of each block."""
    progress = StageLog("parse", "records")
    files = [file for source in sources for file in source.files]
    whole = max(1, sum(storage.size(file) for file in files))
    readers = min(len(files), max(2, int(ray.cluster_resources().get("CPU", 1)) // 4))
    lines = ray.data.from_items(list(range(len(files))), override_num_blocks=len(files)).map_batches(
        functools.partial(jsonl.read_files, uris=files, block_bytes=block_bytes),
        batch_size=None,
        batch_format="pyarrow",
        num_cpus=READER_CPUS,
        compute=ray.data.TaskPoolStrategy(size=readers),
    )
    dataset = lines.map_batches(
        functools.partial(
            tasks.parse_blocks,
            config=config,
            files=files,
            staging=storage.join(config.output, output.STAGING, lease.token),
            rejects=storage.join(config.output, "rejects"),
            token=lease.token,
        ),
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=PARSER_CPUS,
    )
    for stage in (lines, dataset):
        stage.context.enable_progress_bars = False
        stage.context.issue_detectors_config.detectors = []
        stage.context.target_max_block_size = max(1, block_bytes // 2)  # pass every block of lines on at once
    connection.quiet()  # our own lines tell the progress; Ray Data's import has set its loggers anew
    read: Counter[int] = Counter()
    blocks, parsed, records = [], [], 0
    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.block_refs:
            shards = ray.get(tasks.shard_facts.remote(block))
            blocks.append(Hashes(block, max((shard.file for shard in shards), default=-1)))
            for shard in shards:
                if shard.problem:
                    raise (ResourceError if shard.resources else UsageError)(shard.problem)
                parsed.append(shard)
                records += shard.counts["records"]
                read[shard.file] = max(read[shard.file], shard.read)
        progress.update(records, read.total() / whole)
        lease.check()
    progress.end(records)
    return blocks, sorted(parsed, key=lambda shard: (shard.file, shard.first_line))


def deduplicate(config: PrepareConfig, sources: list[Source], blocks: list[Hashes], sessions: int) -> Deduplicated:
    """Finds the duplicates by their hashes, which are handed to one task for each range of them."""
    progress = StageLog("deduplicate", "sessions")
    partitions = -(-sessions // SESSIONS_A_PARTITION)
    firsts = [source.first for source in sources[1:]]
    # Not all: a task's arguments lie on one node together.
    theirs = [block.ref for block in blocks if firsts and block.last_file >= firsts[0]]
    evaluation = tasks.evaluation_hashes.remote(firsts, *theirs)
    task: Any = tasks.scatter.options(num_returns=partitions)
    scattered = [
        task.remote(config, partitions, len(sources[0].files), evaluation, *group)
        for group in _split([block.ref for block in blocks], MAX_GROUPS)
    ]
    columns = [[row] for row in scattered] if partitions == 1 else scattered
    parts = [tasks.deduplicate.remote(config, *(row[p] for row in columns)) for p in range(partitions)]
    found = Deduplicated.together(ray.get(parts))
    progress.end(sessions)
    return found


def groups_of(parsed: list[Shard], sources: list[Source], first_split: int) -> list[list[Staged]]:
    """The staged shards as tasks get them; the splits of evaluation sets are those from ``first_split`` on."""
    staged = [
        Staged(shard.uri, split if split >= first_split else None)
        for split, source in enumerate(sources, first_split - 1)
        for shard in parsed
        if shard.uri and source.owns(shard)
    ]
    return _split(staged, MAX_GROUPS)


def count(groups: list[list[Staged]], survivors: Any, splits: int, sessions: int) -> CorpusCounts:
    """Counts what is in the shards, so many sessions."""
    progress = StageLog("count", "sessions")
    # No list of ours holds the parts, of 9 MB each, until all are there.
    parts = as_completed([tasks.count.remote(group, survivors, splits) for group in groups], progress, sessions)
    total: CorpusCounts = next(parts)
    for part in parts:
        total += part
    progress.end(int(total.sessions.sum()))
    return total


def encode(
    config: PrepareConfig,
    groups: list[list[Staged]],
    survivors: Any,
    vocabularies: tuple[Vocabulary, Vocabulary],
    sessions: dict[str, int],
) -> tuple[dict[str, Counter[str]], dict[str, Counter[str]], list[list[Any]]]:
    """By split the pairs left out by reason, and the examples about the persona by rule.

    And for each group the packed examples of each part.
    """
    progress = StageLog("encode", "sessions")
    numbers = _parts(sessions)
    task: Any = parquet.encode.options(num_returns=1 + sum(numbers.values()))
    put = [ray.put(vocabulary) for vocabulary in vocabularies]
    rows = [task.remote(config, group, survivors, *put, numbers) for group in groups]
    left_out, related = ({split: Counter[str]() for split in numbers} for _ in range(2))
    for found in as_completed([row[0] for row in rows], progress, sum(sessions.values())):
        for total, counts in zip((left_out, related), found, strict=True):
            for split, reasons in counts.items():
                total[split].update(reasons)
    progress.end(sum(sessions.values()))
    return left_out, related, [row[1:] for row in rows]


def write(
    config: PrepareConfig, token: str, rows: list[list[Any]], sessions: dict[str, int]
) -> dict[str, list[DataFile]]:
    """The files of each split, in order."""
    progress = StageLog("write", "sessions")
    writes = []
    places = ((split, part) for split, parts in _parts(sessions).items() for part in range(parts))
    for i, (split, part) in enumerate(places):
        pieces = [row[i] for row in rows]
        writes.append(parquet.write_part.remote(config.output, token, split, part, *pieces))
        for row in rows:
            row[i] = None  # so that the object store can let go of what is written
    del pieces
    files: dict[str, list[DataFile]] = {split: [] for split in sessions}
    for file in as_completed(writes, progress, sum(sessions.values())):
        if file is not None:
            files[file.path.partition("/")[0]].append(file)
    progress.end(sum(sessions.values()))
    return {split: sorted(found, key=lambda file: file.path) for split, found in files.items()}


def _parts(sessions: dict[str, int]) -> dict[str, int]:
    """How many files each split is written as."""
    return {split: max(1, -(-n // SESSIONS_A_PART)) for split, n in sessions.items()}


def _split(items: list[T], groups: int) -> list[list[T]]:
    """Items in at most so many groups of like size, in order."""
    groups = min(groups, len(items))
    return [items[len(items) * i // groups : len(items) * (i + 1) // groups] for i in range(groups)]
