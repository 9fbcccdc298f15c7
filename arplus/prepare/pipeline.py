"""Raw records → an encoded data set: the preparation, from the files to the committed manifest.

    read      one task a file streams it and cuts it into blocks of lines (:mod:`arplus.prepare.jsonl`)   Ray Data
    parse     a block's sessions are staged as a shard; only ids and hashes go on                      Ray Data
    dedup     partitions of the hashes: which ids are duplicates, where the splits end                 Ray tasks
    count     characters and persona words of the training sessions, shard by shard                    Ray tasks
    encode    shards to examples, cut into parts by example id                                         Ray tasks
    write     each part sorted by example id, which is a hash: a global shuffle                        Ray tasks
    commit    vocabularies, data card, then the manifest; a folder without one is no data set

The result depends on the records and the settings alone: not on blocks, files, CPUs or the order in which tasks
end. What grows with the input: 80 bytes a session in the object store during deduplication and the packed examples
before they are written (Ray spills both to disk), and in the driver 8 bytes a duplicate.

An evaluation set keeps all its records. A session of the input whose dialogue is in one is a session, but in no split;
it counts as overlap of the first set that has it.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b
from typing import Any, TypeVar

import numpy as np
import ray
from numpy.typing import NDArray

from arplus import storage
from arplus.cluster import nodes
from arplus.config import PrepareConfig, to_dict, validate
from arplus.data.dataset import FORMAT
from arplus.data.examples import LEFT_OUT
from arplus.data.sessions import DUPLICATE_KEYS
from arplus.errors import ResourceError, UsageError
from arplus.prepare import card, output, parquet, ray_errors, tasks
from arplus.prepare.duplicates import MAX_SHARE, SPLITS, Boundaries, boundaries
from arplus.prepare.jsonl import BLOCK_BYTES, LinesDatasource
from arplus.prepare.lease import Lease
from arplus.prepare.shards import Shard, Staged
from arplus.prepare.sources import Source, add_up, find_sources, summarise
from arplus.prepare.stage_log import StageLog, as_completed
from arplus.text import ALWAYS_CHARACTERS, ALWAYS_PERSONA_WORDS, Vocabulary

T = TypeVar("T")

log = logging.getLogger(__name__)

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

    Nothing is committed unless all went well. Raises :class:`UsageError` for input that cannot be read or holds no
    session, more rejects than allowed, storage that refuses or has no room, and an output that is in use.
    """
    # Checked: it also makes 20000 and 20000.0 the same rule, wherever the settings come from.
    config = validate(replace(config, input=storage.absolute(config.input), output=storage.absolute(config.output)))
    sources = find_sources(config)
    nodes.check_workers()
    given = {
        name: Vocabulary.load(uri) if uri else None
        for name, uri in (("characters", config.character_vocabulary), ("persona", config.persona_vocabulary))
    }
    for flag, wanted in (("valid", config.valid), ("test", config.test)):
        if MAX_SHARE < wanted < 1:
            log.warning("--%s %g: a split takes at most a share of %g; taking that", flag, wanted, MAX_SHARE)
    lease = output.claim(config.output)
    finished = False
    try:
        with ray_errors.plainly(config.output):
            manifest = _prepare(config, sources, given, lease, block_bytes)
        finished = True
    finally:
        output.leave(config.output, lease, finished)
    return manifest


def _prepare(
    config: PrepareConfig, sources: list[Source], given: dict[str, Vocabulary | None], lease: Lease, block_bytes: int
) -> dict[str, Any]:
    began = time.monotonic()
    input_, *evaluation_sets = sources
    splits = [*SPLITS, *(source.name for source in evaluation_sets)]

    blocks, parsed = _parse(config, sources, lease, block_bytes)
    facts = {source.name: add_up(config, source, parsed) for source in sources}
    counts, rejected = facts[""]
    lease.check()

    duplicates, removed, overlapping, ends = _deduplicate(config, sources, blocks, counts["sessions"])
    del blocks
    duplicates_removed, removed = len(removed), np.union1d(removed, overlapping.ids)
    removed_ref = ray.put(removed)
    split_of = {
        file: i for i, s in enumerate(evaluation_sets, len(SPLITS)) for file in range(s.first, s.first + len(s.files))
    }
    parsed.sort(key=lambda shard: (shard.file, shard.first_line))
    groups = _split([Staged(s.uri, split_of.get(s.file)) for s in parsed if s.uri], MAX_GROUPS)

    total = _count(groups, removed_ref, ends, splits, sum(n["sessions"] for n, _ in facts.values()))
    characters_seen = {chr(i): int(total.characters[i]) for i in np.flatnonzero(total.characters)}
    characters = given["characters"] or Vocabulary.from_counts(
        characters_seen,
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
    lease.check()
    sessions = dict(zip(splits, total.sessions.tolist(), strict=True))
    left_out, written = _encode_and_write(config, lease, groups, removed_ref, ends, characters, persona_words, sessions)
    if not written["train"]:
        raise UsageError(_no_example(config, sessions, left_out["train"], len(overlapping.ids)))

    overlaps = {source.name: int((overlapping.files == i).sum()) for i, source in enumerate(evaluation_sets)}
    manifest = {
        "format": FORMAT,
        "fingerprint": "",
        "records": counts["records"],
        "rejected": dict(sorted(rejected.items())),
        "duplicates": duplicates,
        "duplicate_key": config.duplicate_key,
        "sessions": sum(sessions[split] for split in SPLITS) + sum(overlaps.values()),
        "overlaps": overlaps,
        "splits": {
            split: {
                "sessions": sessions[split],
                "examples": sum(file.rows for file in written[split]),
                "files": [file.facts() for file in written[split]],
            }
            for split in splits
        },
        "examples_left_out": _total(left_out[split] for split in SPLITS),
        "evaluation_sets": {
            source.name: {
                "records": facts[source.name][0]["records"],
                "rejected": dict(sorted(facts[source.name][1].items())),
                "examples_left_out": _total([left_out[source.name]]),
                "source": source.uri,
                "files_left_out": summarise(source.left_out),
            }
            for source in evaluation_sets
        },
        "vocabulary": {"characters": characters.size, "persona_words": persona_words.size},
        "uid_missing": counts["uid_missing"],
        "profiles_cut": {
            name: sum(facts[source.name][0][name] for source in sources) for name in ("tags_left_out", "words_cut")
        },
        "blank_lines": counts["blank_lines"],
        "rules": to_dict(config.rules),
        "settings": _settings(config),
        "source": {
            "input": config.input,
            "files": len(input_.files),
            "files_left_out": summarise(input_.left_out),
        },
    }
    manifest["fingerprint"] = _fingerprint(manifest, characters, persona_words)
    assert manifest["records"] == sum(rejected.values()) + duplicates_removed + manifest["sessions"], manifest
    facts_of_card = card.facts(
        manifest, total.histograms, characters_seen, characters, total.persona_words, persona_words
    )
    output.commit(config.output, lease, manifest, facts_of_card, characters, persona_words)
    seconds = time.monotonic() - began
    log.info("prepared %d records in %.0f s (%.0f a second)", counts["records"], seconds, counts["records"] / seconds)
    return manifest


def _no_example(config: PrepareConfig, sessions: dict[str, int], left_out: Counter[str], overlaps: int) -> str:
    """What a preparation without a training example says: where its sessions are, and why their pairs are none."""
    where = ", ".join(f"{sessions[split]} in {split}" for split in SPLITS)
    where += f", {overlaps} kept out for an evaluation set" if overlaps else ""
    reasons = [f"{n} {reason} ({LEFT_OUT[reason]})" for reason, n in left_out.most_common() if n]
    if reasons:
        why = f"pairs of utterances left out of train: {'; '.join(reasons)}"
    elif sessions["train"]:
        why = "every session in train has a single utterance; an example takes two"
    else:
        why = "too few dialogues for a training split; prepare more, or set --valid 0 and --test 0"
    return f"{config.input}: no training example; sessions: {where}; {why}"


def _parse(
    config: PrepareConfig, sources: list[Source], lease: Lease, block_bytes: int
) -> tuple[list[Any], list[Shard]]:
    """Runs read and parse; returns references to the hashes of each block, and what is known of each block."""
    progress = StageLog("parse", "records")
    files = [file for source in sources for file in source.files]
    sizes = [storage.size(file) for file in files]
    read: Counter[int] = Counter()
    staging = storage.join(config.output, output.STAGING, lease.token)
    readers = min(len(files), max(2, int(ray.cluster_resources().get("CPU", 1)) // 4))
    lines = ray.data.read_datasource(
        LinesDatasource(files, block_bytes), num_cpus=READER_CPUS, concurrency=readers, override_num_blocks=len(files)
    )
    dataset = lines.map_batches(
        tasks.parse_blocks,
        fn_kwargs={
            "config": config,
            "files": files,
            "staging": staging,
            "rejects": storage.join(config.output, "rejects"),
            "token": lease.token,
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
    blocks, parsed, records = [], [], 0
    for bundle in dataset.iter_internal_ref_bundles():
        for block in bundle.block_refs:
            blocks.append(block)
            parsed += (facts := ray.get(tasks.shard_facts.remote(block)))
            records += sum(shard.counts["records"] for shard in facts)
            for shard in facts:
                if shard.problem:
                    raise (ResourceError if shard.resources else UsageError)(shard.problem)
                read[shard.file] = max(read[shard.file], shard.read)
        progress.update(records, sum(read.values()) / max(1, sum(sizes)))
        lease.check()
    progress.end(records)
    return blocks, parsed


@dataclass(frozen=True)
class Overlapping:
    """Sessions of the input whose dialogue is in an evaluation set, and which are no duplicates."""

    ids: NDArray[np.int64]
    files: NDArray[np.int64]
    """For each the index of the first evaluation set that has its dialogue."""


def _deduplicate(
    config: PrepareConfig, sources: list[Source], blocks: list[Any], sessions: int
) -> tuple[dict[str, int], NDArray[np.int64], Overlapping, Boundaries]:
    """Duplicates by each definition, ids of those to remove in rising order, overlaps, and where the splits end."""
    progress = StageLog("deduplicate", "sessions")
    partitions = -(-sessions // SESSIONS_A_PARTITION)
    files = len(sources[0].files)
    evaluation = ray.get(tasks.evaluation_hashes.remote(files, *(blocks if len(sources) > 1 else [])))
    evaluation_ref = ray.put(evaluation)
    task: Any = tasks.scatter.options(num_returns=partitions)
    scattered = [task.remote(config, partitions, files, evaluation_ref, *group) for group in _split(blocks, MAX_GROUPS)]
    columns = [[row] for row in scattered] if partitions == 1 else scattered
    found: list[tasks.Deduplicated] = ray.get(
        [tasks.deduplicate.remote(config, *(row[p] for row in columns)) for p in range(partitions)]
    )
    removed = np.sort(np.concatenate([part.removed for part in found]))
    duplicates: dict[str, int] = {key: sum(part.duplicates[key] for part in found) for key in DUPLICATE_KEYS}
    ends = boundaries(
        config.valid,
        config.test,
        np.concatenate([part.valid for part in found]),
        np.concatenate([part.test for part in found]),
    )
    twins = np.concatenate([part.twins for part in found])
    first_files = np.array([source.first for source in sources[1:]], np.int64)
    sets = np.searchsorted(first_files, evaluation[twins, 2].astype(np.int64), side="right") - 1
    progress.end(sessions)
    return duplicates, removed, Overlapping(np.concatenate([part.overlapping for part in found]), sets), ends


def _count(
    groups: list[list[Staged]], removed: Any, ends: Boundaries, splits: list[str], sessions: int
) -> tasks.CorpusCounts:
    progress = StageLog("count", "sessions")
    total: tasks.CorpusCounts | None = None
    counts = [tasks.count.remote(group, removed, ends, len(splits)) for group in groups]
    for part in as_completed(counts, progress, sessions):
        total = part if total is None else total + part
    assert total is not None
    progress.end(int(total.sessions.sum()))
    return total


def _encode_and_write(
    config: PrepareConfig,
    lease: Lease,
    groups: list[list[Staged]],
    removed: Any,
    ends: Boundaries,
    characters: Vocabulary,
    persona_words: Vocabulary,
    sessions: dict[str, int],
) -> tuple[dict[str, Counter[str]], dict[str, list[parquet.WrittenFile]]]:
    """By split, the pairs left out by reason, and the files in order."""
    progress = StageLog("encode", "sessions")
    vocabularies = ray.put(characters), ray.put(persona_words)
    numbers = {split: max(1, -(-n // SESSIONS_A_PART)) for split, n in sessions.items()}
    task: Any = parquet.encode.options(num_returns=1 + sum(numbers.values()))
    rows = [task.remote(config, group, removed, ends, *vocabularies, numbers) for group in groups]
    left_out: dict[str, Counter[str]] = {split: Counter() for split in numbers}
    for counts in as_completed([row[0] for row in rows], progress, sum(sessions.values())):
        for split, reasons in counts.items():
            left_out[split].update(reasons)
    progress.end(sum(sessions.values()))
    lease.check()
    progress = StageLog("write", "sessions")
    places = [(split, part) for split in numbers for part in range(numbers[split])]
    writes = []
    for i, (split, part) in enumerate(places, 1):
        writes.append(parquet.write_part.remote(config.output, lease.token, split, part, *(row[i] for row in rows)))
        for row in rows:
            row[i] = None  # so that the object store can let go of what is written
    written: dict[str, list[parquet.WrittenFile]] = {split: [] for split in numbers}
    for _ in as_completed(list(writes), progress, sum(sessions.values())):
        pass
    for (split, _), file in zip(places, ray.get(writes), strict=True):
        if file is not None:
            written[split].append(file)
    progress.end(sum(sessions.values()))
    return left_out, written


def _split(items: list[T], groups: int) -> list[list[T]]:
    """Items in at most so many groups of like size, in order."""
    groups = min(groups, len(items))
    return [items[len(items) * i // groups : len(items) * (i + 1) // groups] for i in range(groups)]


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total = Counter[str]()
    for part in counts:
        total.update(part)
    return dict(sorted(total.items()))


def _settings(config: PrepareConfig) -> dict[str, Any]:
    """What decides the content beside the rules, whatever the place of the files."""
    elsewhere = ("input", "output", "evaluation_set", "character_vocabulary", "persona_vocabulary", "max_reject_share")
    told = {*elsewhere, *to_dict(config.rules)}
    return {name: value for name, value in to_dict(config).items() if name not in told}


def _fingerprint(manifest: dict[str, Any], characters: Vocabulary, persona_words: Vocabulary) -> str:
    content = {
        "format": manifest["format"],
        "rules": manifest["rules"],
        "settings": manifest["settings"],
        "vocabularies": [characters.tokens, persona_words.tokens],
        "rows": {split: [f["digest"] for f in facts["files"]] for split, facts in manifest["splits"].items()},
    }
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
