"""Raw records → an encoded data set: the preparation, from the files to the committed manifest.

    read      one task a file streams it and cuts it into blocks of lines (:mod:`arplus.data.lines`)   Ray Data
    parse     a block's sessions are staged as a shard; only ids and hashes go on                      Ray Data
    dedup     partitions of the hashes: which ids are duplicates, where the splits end                 Ray tasks
    count     characters and persona words of the training sessions, shard by shard                    Ray tasks
    encode    shards to examples, cut into parts by example id                                         Ray tasks
    write     each part sorted by example id, which is a hash: a global shuffle                        Ray tasks
    commit    vocabularies, then the manifest; a folder without one is no data set

The result depends on the records and the settings alone: not on blocks, files, CPUs or the order in which tasks
end. What grows with the input: 80 bytes a session in the object store during deduplication and the packed examples
before they are written (Ray spills both to disk), and in the driver 8 bytes a duplicate.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from arplus import storage
from arplus.config import PrepareConfig, checked, to_dict
from arplus.data import stages
from arplus.data.dataset import FORMAT, MANIFEST
from arplus.data.duplicates import MAX_SHARE, SPLITS, Boundaries, boundaries
from arplus.data.lines import BLOCK_BYTES, LinesDatasource, input_files
from arplus.data.records import REJECT_REASONS
from arplus.data.sessions import DUPLICATE_KEYS
from arplus.errors import UserError
from arplus.text import ALWAYS_CHARACTERS, ALWAYS_PERSONA_WORDS, Vocabulary

T = TypeVar("T")

log = logging.getLogger(__name__)

STAGING = "_temporary"
"""Folder below the output that holds unfinished work, and marks the output as unfinished."""
OUR_FOLDERS = (*SPLITS, "vocabulary", "rejects", STAGING)
"""Everything that a preparation makes below its output, beside the manifest."""

SESSIONS_A_PARTITION = 2_000_000
"""Sessions whose hashes one deduplication task holds."""
SESSIONS_A_PART = 400_000
"""Training sessions a Parquet file, about half a million examples."""
MAX_GROUPS = 256
"""Shards are handed to count and encode in at most so many groups, which bounds the pieces of the shuffle."""

# A reader must never wait for parsers to finish nor keep them from starting, so it asks for next to nothing; and
# Ray Data fuses two stages into one process where they ask for the same.
READER_CPUS, PARSER_CPUS = 0.02, 0.9


def prepare(config: PrepareConfig, *, block_bytes: int = BLOCK_BYTES) -> dict[str, Any]:
    """Prepares a data set on the connected Ray cluster and returns its manifest.

    Nothing is committed unless all went well. Raises :class:`UserError` for input that cannot be read or holds no
    session, more rejects than allowed, and an output that is in use.
    """
    began = time.monotonic()
    # Checked: it also makes 20000 and 20000.0 the same rule, wherever the settings come from.
    config = checked(replace(config, input=storage.absolute(config.input), output=storage.absolute(config.output)))
    files = input_files(config.input)
    given = {
        name: Vocabulary.load(uri) if uri else None
        for name, uri in (("characters", config.character_vocabulary), ("persona", config.persona_vocabulary))
    }
    for flag, wanted in (("valid", config.valid), ("test", config.test)):
        if MAX_SHARE < wanted < 1:
            log.warning("--%s %g: a split takes at most a share of %g; taking that", flag, wanted, MAX_SHARE)
    _claim_output(config.output)

    blocks, shards = _parse(config, files, block_bytes)
    counts, rejected = Counter[str](), Counter[str]()
    for shard in shards:
        counts.update(shard.counts)
        rejected.update(shard.rejected)
    _check_records(config, shards, counts, rejected)

    duplicates, removed, ends = _deduplicate(config, blocks, counts["sessions"])
    del blocks
    staged = [shard.uri for shard in sorted(shards, key=lambda s: (s.file, s.first_line)) if shard.uri]
    groups = _split(staged, MAX_GROUPS)
    removed_ref = ray.put(removed)

    total = _count(groups, removed_ref, ends)
    characters = given["characters"] or Vocabulary.from_counts(
        {chr(i): int(total.characters[i]) for i in np.flatnonzero(total.characters)},
        minimum=config.min_character_count,
        maximum=config.max_characters,
        always=ALWAYS_CHARACTERS,
    )
    persona_words = given["persona"] or Vocabulary.from_counts(
        total.persona_words,
        minimum=config.min_persona_word_count,
        maximum=config.max_persona_words,
        always=ALWAYS_PERSONA_WORDS,
    )
    sessions = dict(zip(SPLITS, total.sessions.tolist(), strict=True))
    parts = {split: max(1, -(-n // SESSIONS_A_PART)) for split, n in sessions.items()}
    left_out, written = _encode_and_write(config, groups, removed_ref, ends, characters, persona_words, parts)

    manifest = {
        "format": FORMAT,
        "fingerprint": "",
        "records": counts["records"],
        "rejected": dict(sorted(rejected.items())),
        "duplicates": duplicates,
        "duplicate_key": config.duplicate_key,
        "sessions": sum(sessions.values()),
        "splits": {
            split: {
                "sessions": sessions[split],
                "examples": sum(file.rows for file in written[split]),
                "files": [file.facts() for file in written[split]],
            }
            for split in SPLITS
        },
        "examples_left_out": dict(sorted(left_out.items())),
        "vocabulary": {"characters": characters.size, "persona_words": persona_words.size},
        "uid_missing": counts["uid_missing"],
        "blank_lines": counts["blank_lines"],
        "rules": _rules(config),
        "source": {"input": config.input, "files": len(files)},
    }
    manifest["fingerprint"] = _fingerprint(manifest, characters, persona_words)
    assert manifest["records"] == sum(rejected.values()) + len(removed) + manifest["sessions"], manifest
    characters.save(storage.join(config.output, "vocabulary", "characters.txt"))
    persona_words.save(storage.join(config.output, "vocabulary", "persona_words.txt"))
    storage.write_json(storage.join(config.output, MANIFEST), manifest)
    storage.delete(storage.join(config.output, STAGING))
    seconds = time.monotonic() - began
    log.info("prepared %d records in %.0f s (%.0f a second)", counts["records"], seconds, counts["records"] / seconds)
    return manifest


def report(manifest: dict[str, Any]) -> str:
    """The counts of a manifest as a short table for people."""
    rejected = sum(manifest["rejected"].values())
    removed = manifest["duplicates"][manifest["duplicate_key"]]
    rows = [
        ("records", manifest["records"], ""),
        ("rejected", rejected, ", ".join(f"{n} {reason}" for reason, n in manifest["rejected"].items())),
        ("duplicates removed", removed, ", ".join(f"{n} by {key}" for key, n in manifest["duplicates"].items())),
        ("sessions", manifest["sessions"], ""),
    ]
    for split, facts in manifest["splits"].items():
        rows.append((f"  {split}", facts["sessions"], f"{facts['examples']:,} examples"))
    for reason, n in manifest["examples_left_out"].items():
        rows.append((f"left out: {reason}", n, "pairs of utterances"))
    for name, size in manifest["vocabulary"].items():
        rows.append((f"vocabulary: {name}", size, "with the nine special tokens"))
    lines = [f"{name:<32}{number:>12,}  {note}".rstrip() for name, number, note in rows]
    return "\n".join([*lines, f"{'fingerprint':<32}{manifest['fingerprint']}"])


def _claim_output(output: str) -> None:
    """Makes the output ours and empty: what an unfinished preparation left is removed, anything else is an error."""
    if storage.exists(storage.join(output, MANIFEST)):
        raise UserError(f"{output}: holds a prepared data set; choose another --output or delete it first")
    marker = storage.join(output, STAGING, "unfinished")
    if storage.exists(marker):
        log.info("removing what an unfinished preparation left in %s", output)
        for folder in OUR_FOLDERS:
            storage.delete(storage.join(output, folder))
    elif storage.exists(output) and storage.list_files(output):
        raise UserError(f"{output}: is not empty and no unfinished data set; choose another --output")
    storage.write_bytes(marker, b"removed when the manifest is written\n")


def _parse(config: PrepareConfig, files: list[str], block_bytes: int) -> tuple[list[Any], list[stages.Shard]]:
    """Runs read and parse; returns references to the hashes of each block, and what is known of each block."""
    began = time.monotonic()
    staging = storage.join(config.output, STAGING, "sessions")
    _make_folder(staging)
    readers = min(len(files), max(2, int(ray.cluster_resources().get("CPU", 1)) // 4))
    lines = ray.data.read_datasource(
        LinesDatasource(files, block_bytes), num_cpus=READER_CPUS, concurrency=readers, override_num_blocks=len(files)
    )
    dataset = lines.map_batches(
        stages.parse_blocks,
        fn_kwargs={
            "config": config,
            "files": files,
            "staging": staging,
            "rejects": storage.join(config.output, "rejects"),
        },
        batch_size=None,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=PARSER_CPUS,
    )
    for stage in (lines, dataset):
        stage.context.enable_progress_bars = False
        stage.context.issue_detectors_config.detectors = []
        stage.context.target_max_block_size = max(1, block_bytes // 2)  # pass every block of lines on at once
    for name, level in (("ray.data", logging.WARNING), ("ray.data._internal.progress", logging.ERROR)):
        logging.getLogger(name).setLevel(level)  # our own lines tell the progress
    blocks, shards, records, spoke = [], [], 0, began
    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.block_refs:
            blocks.append(block)
            shards += (facts := ray.get(stages.shard_facts.remote(block)))
            records += sum(shard.counts["records"] for shard in facts)
        if time.monotonic() - spoke > 10:
            spoke = time.monotonic()
            log.info("parse: %d records, %.0f a second", records, records / (spoke - began))
    _log_stage("parse", began, records, "records")
    return blocks, shards


def _check_records(
    config: PrepareConfig, shards: list[stages.Shard], counts: Counter[str], rejected: Counter[str]
) -> None:
    problems = [shard.problem for shard in shards if shard.problem]
    if problems:
        raise UserError("; ".join(problems))
    if not counts["records"]:
        raise UserError(f"{config.input}: no record in it")
    rejects = sum(rejected.values())
    where = f"{'; '.join(f'{n} {r} ({REJECT_REASONS[r]})' for r, n in rejected.most_common(3))}. "
    where += f"Each is kept with its reason in {storage.join(config.output, 'rejects')}"
    if rejects / counts["records"] > config.max_reject_share:
        raise UserError(
            f"{config.input}: {rejects} of {counts['records']} records rejected, more than --max-reject-share "
            f"{config.max_reject_share:g} allows: {where}"
        )
    if not counts["sessions"]:
        raise UserError(f"{config.input}: no session among {counts['records']} records: {where}")


def _deduplicate(
    config: PrepareConfig, blocks: list[Any], sessions: int
) -> tuple[dict[str, int], NDArray[np.int64], Boundaries]:
    """Duplicates by each definition, the ids to remove in rising order, and where the splits end."""
    began = time.monotonic()
    partitions = -(-sessions // SESSIONS_A_PARTITION)
    task: Any = stages.scatter.options(num_returns=partitions)
    scattered = [task.remote(partitions, *group) for group in _split(blocks, MAX_GROUPS)]
    columns = [[row] for row in scattered] if partitions == 1 else scattered
    found: list[stages.Deduplicated] = ray.get(
        [stages.deduplicate.remote(config, *(row[p] for row in columns)) for p in range(partitions)]
    )
    removed = np.sort(np.concatenate([part.removed for part in found]))
    duplicates: dict[str, int] = {key: sum(part.duplicates[key] for part in found) for key in DUPLICATE_KEYS}
    ends = boundaries(
        config.valid,
        config.test,
        np.concatenate([part.valid for part in found]),
        np.concatenate([part.test for part in found]),
    )
    _log_stage("deduplicate", began, sessions, "sessions")
    return duplicates, removed, ends


def _count(groups: list[list[str]], removed: Any, ends: Boundaries) -> stages.Counts:
    began = time.monotonic()
    total: stages.Counts | None = None
    for part in _as_completed([stages.count.remote(group, removed, ends) for group in groups], "count"):
        if total is None:
            total = stages.Counts(part.sessions.copy(), part.characters.copy(), part.persona_words)
            continue
        total.sessions += part.sessions
        total.characters += part.characters
        total.persona_words.update(part.persona_words)
    assert total is not None
    _log_stage("count", began, int(total.sessions.sum()), "sessions")
    return total


def _encode_and_write(
    config: PrepareConfig,
    groups: list[list[str]],
    removed: Any,
    ends: Boundaries,
    characters: Vocabulary,
    persona_words: Vocabulary,
    parts: dict[str, int],
) -> tuple[Counter[str], dict[str, list[stages.WrittenFile]]]:
    """Pairs left out by reason, and the files of each split in order."""
    began = time.monotonic()
    vocabularies = ray.put(characters), ray.put(persona_words)
    task: Any = stages.encode.options(num_returns=1 + sum(parts.values()))
    rows = [task.remote(config, group, removed, ends, *vocabularies, parts) for group in groups]
    left_out = Counter[str]()
    for counts in _as_completed([row[0] for row in rows], "encode"):
        left_out.update(counts)
    places = [(split, part) for split in SPLITS for part in range(parts[split])]
    writes = []
    for i, (split, part) in enumerate(places, 1):
        writes.append(stages.write_part.remote(config.output, split, part, *(row[i] for row in rows)))
        for row in rows:
            row[i] = None  # so that the object store can let go of what is written
    written: dict[str, list[stages.WrittenFile]] = {split: [] for split in SPLITS}
    for _ in _as_completed(list(writes), "write"):
        pass
    for (split, _), file in zip(places, ray.get(writes), strict=True):
        if file is not None:
            written[split].append(file)
    _log_stage("encode and write", began, sum(f.rows for files in written.values() for f in files), "examples")
    return left_out, written


def _as_completed(refs: list[Any], stage: str) -> Iterable[Any]:
    """Results in the order in which tasks end, with a line of progress now and then."""
    total, began = len(refs), time.monotonic()
    spoke = began
    while refs:
        ready, refs = ray.wait(refs, num_returns=1)
        yield from ray.get(ready)
        if time.monotonic() - spoke > 10 and refs:
            spoke = time.monotonic()
            done = total - len(refs)
            log.info("%s: %d of %d tasks, %.0f s to go", stage, done, total, (spoke - began) / done * len(refs))


def _split(items: list[T], groups: int) -> list[list[T]]:
    """Items in at most so many groups of like size, in order."""
    groups = min(groups, len(items))
    return [items[len(items) * i // groups : len(items) * (i + 1) // groups] for i in range(groups)]


def _rules(config: PrepareConfig) -> dict[str, Any]:
    """The settings that decide the content, whatever the place of the files."""
    elsewhere = ("input", "output", "character_vocabulary", "persona_vocabulary", "max_reject_share")
    return {name: value for name, value in to_dict(config).items() if name not in elsewhere}


def _fingerprint(manifest: dict[str, Any], characters: Vocabulary, persona_words: Vocabulary) -> str:
    content = {
        "format": manifest["format"],
        "rules": manifest["rules"],
        "vocabularies": [characters.tokens, persona_words.tokens],
        "rows": {split: [f["digest"] for f in manifest["splits"][split]["files"]] for split in SPLITS},
    }
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


def _make_folder(uri: str) -> None:
    if "://" not in uri:
        filesystem, path = storage.resolve(uri)
        filesystem.create_dir(path)


def _log_stage(stage: str, began: float, items: int, what: str) -> None:
    seconds = time.monotonic() - began
    log.info("%s: %d %s in %.1f s (%.0f a second)", stage, items, what, seconds, items / max(seconds, 1e-9))
