"""Raw records → an encoded data set: the preparation, from the files to the committed manifest.

    read      one task per file streams it and cuts it into blocks of lines (:mod:`arplus.prepare.jsonl`)   Ray Data
    parse     a block's sessions are staged as a shard; only ids and hashes go on                      Ray Data
    dedup     partitions of the hashes: which ids are duplicates, where the splits end                 Ray tasks
    count     characters and persona words of the training sessions, shard by shard                    Ray tasks
    encode    shards to examples, cut into parts by example id                                         Ray tasks
    write     each part sorted by example id, which is a hash: a global shuffle                        Ray tasks
    commit    vocabularies, data card, then the manifest; a folder without one is not a data set

The result depends on the records and the settings alone: not on blocks, files, CPUs or the order in which tasks
end. What grows with the input: 80 bytes per session in the object store during deduplication and the packed examples
before they are written (Ray spills both to disk), and in the driver 8 bytes per duplicate.

An evaluation set keeps all its records. A session of the input whose dialogue is in one is a session, but in no split;
it counts as overlap of the first set that has it.
"""

import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from hashlib import blake2b
from typing import Any

import numpy as np
import ray

from arplus import storage
from arplus.cluster import nodes
from arplus.config import PrepareConfig, to_dict, validate
from arplus.data.examples import LEFT_OUT
from arplus.data.labels import RULES
from arplus.data.manifest import FORMAT, DataFile, EvaluationSetFacts, InputFacts, Manifest, SplitFacts
from arplus.errors import ArplusError, ResourceError, UsageError
from arplus.prepare import output, stages
from arplus.prepare.card import Coverage, DataCard
from arplus.prepare.duplicates import MAX_SHARE, SPLITS, boundaries
from arplus.prepare.jsonl import BLOCK_BYTES
from arplus.prepare.lease import Lease
from arplus.prepare.sources import Added, Source, add_up, find_sources, summarise
from arplus.prepare.tasks import Deduplicated, Survivors
from arplus.text import ALWAYS_CHARACTERS, ALWAYS_PERSONA_WORDS, Vocabulary, sizes

log = logging.getLogger(__name__)


def prepare(config: PrepareConfig, *, block_bytes: int = BLOCK_BYTES) -> Manifest:
    """Prepares a data set on the connected Ray cluster and returns its manifest.

    Nothing is committed unless all went well. Raises :class:`UsageError` for input that cannot be read or holds no
    session, more rejects than allowed, storage that refuses or has no room, and an output that is in use.
    """
    # Checked: it also makes 20000 and 20000.0 the same rule, wherever the settings come from.
    config = validate(replace(config, input=storage.absolute(config.input), output=storage.absolute(config.output)))
    sources = find_sources(config)
    nodes.check_workers()
    given = [Vocabulary.load(uri) if uri else None for uri in (config.character_vocabulary, config.persona_vocabulary)]
    for flag, wanted in (("valid", config.valid), ("test", config.test)):
        if MAX_SHARE < wanted < 1:
            log.warning("--%s %g: a split takes at most a share of %g; taking that", flag, wanted, MAX_SHARE)
    lease = output.claim(config.output)
    finished = False
    try:
        with _plain_errors(config.output):
            manifest = _prepare(config, sources, given, lease, block_bytes)
        finished = True
    finally:
        output.leave(config.output, lease, finished)
    return manifest


@contextmanager
def _plain_errors(what: str) -> Iterator[None]:
    """Turns what a Ray task failed with into the one message that tells the user what to do."""
    try:
        yield
    except (ArplusError, ray.exceptions.RayError, OSError) as error:
        if cause := _ours(error):
            raise cause from None
        if isinstance(error, ray.exceptions.OutOfDiskError):
            problem = f"{what}: Ray's temporary folder is full (RAY_TMPDIR chooses another): {error}"
            raise ResourceError(problem) from error
        raise


def _ours(error: BaseException | None) -> ArplusError | None:
    """The error of ours that a task's error came from; ``None`` where there is none."""
    while error is not None:
        # Ray gives a task's error the class of its cause, and the text of a traceback.
        if isinstance(error, ArplusError) and not isinstance(error, ray.exceptions.RayTaskError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None


def _prepare(
    config: PrepareConfig, sources: list[Source], given: list[Vocabulary | None], lease: Lease, block_bytes: int
) -> Manifest:
    """All stages; ``given`` are the vocabularies that are not to be counted."""
    began = time.monotonic()
    splits = [*SPLITS, *(source.name for source in sources[1:])]
    blocks, parsed = stages.parse(config, sources, lease, block_bytes)
    added = {source.name: add_up(config, source, parsed) for source in sources}
    lease.check()

    duplicates = stages.deduplicate(config, sources, blocks, added[""].counts["sessions"])
    del blocks
    ends = boundaries(config.valid, config.test, duplicates.valid, duplicates.test)
    survivors = ray.put(Survivors(np.union1d(duplicates.removed, duplicates.overlapping), ends))
    groups = stages.groups_of(parsed, sources, len(SPLITS))
    total = stages.count(groups, survivors, len(splits), sum(each.counts["sessions"] for each in added.values()))
    characters = {chr(i): int(total.characters[i]) for i in np.flatnonzero(total.characters)}
    vocabularies = _vocabularies(config, given, characters, total.persona_words)
    lease.check()

    sessions = dict(zip(splits, total.sessions.tolist(), strict=True))
    left_out, related, rows = stages.encode(config, groups, survivors, vocabularies, sessions)
    lease.check()
    files = stages.write(config, lease.token, rows, sessions)
    if not files["train"]:
        raise UsageError(_no_example(config, sessions, left_out["train"], len(duplicates.overlapping)))
    manifest = _manifest(config, sources, added, duplicates, sessions, left_out, related, files, vocabularies)
    assert manifest.records == sum(manifest.rejected.values()) + len(duplicates.removed) + manifest.sessions, manifest
    coverage = {
        "characters": Coverage.of(characters, vocabularies[0]),
        "persona_words": Coverage.of(total.persona_words, vocabularies[1]),
    }
    card = DataCard(manifest=manifest, histograms=total.histograms, vocabulary=coverage)
    output.commit(config.output, lease, manifest, card, *vocabularies)
    seconds, records = time.monotonic() - began, manifest.records
    log.info("prepared %d records in %.0f s (%.0f per second)", records, seconds, records / seconds)
    return manifest


def _vocabularies(
    config: PrepareConfig, given: list[Vocabulary | None], *seen: Mapping[str, int]
) -> tuple[Vocabulary, Vocabulary]:
    """Those of characters and persona words that are given, else of those that were seen."""
    limits = (
        (config.min_character_count, config.max_characters, ALWAYS_CHARACTERS),
        (config.min_persona_word_count, config.max_persona_words, ALWAYS_PERSONA_WORDS),
    )
    characters, persona_words = (
        known or Vocabulary.from_counts(counts, minimum=minimum, maximum=maximum, always=always)
        for known, counts, (minimum, maximum, always) in zip(given, seen, limits, strict=True)
    )
    return characters, persona_words


def _no_example(config: PrepareConfig, sessions: dict[str, int], left_out: Counter[str], overlaps: int) -> str:
    """What a preparation without a training example says: where its sessions are, and why they give none."""
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


def _manifest(
    config: PrepareConfig,
    sources: list[Source],
    added: Mapping[str, Added],
    duplicates: Deduplicated,
    sessions: dict[str, int],
    left_out: dict[str, Counter[str]],
    related: dict[str, Counter[str]],
    files: dict[str, list[DataFile]],
    vocabularies: tuple[Vocabulary, Vocabulary],
) -> Manifest:
    input_, *evaluation_sets = sources
    counts = added[""].counts
    overlaps = {source.name: int((duplicates.sets == i).sum()) for i, source in enumerate(evaluation_sets)}
    sets = {
        source.name: EvaluationSetFacts(
            records=added[source.name].counts["records"],
            rejected=_total([added[source.name].rejected]),
            examples_left_out=_total([left_out[source.name]]),
            source=source.uri,
            files_left_out=summarise(source.left_out),
        )
        for source in evaluation_sets
    }
    return Manifest(
        fingerprint=_fingerprint(config, files, vocabularies),
        source=InputFacts(input=config.input, files=len(input_.files), files_left_out=summarise(input_.left_out)),
        records=counts["records"],
        rejected=_total([added[""].rejected]),
        duplicates=duplicates.duplicates,
        duplicate_key=config.duplicate_key,
        sessions=sum(sessions[split] for split in SPLITS) + sum(overlaps.values()),
        overlaps=overlaps,
        examples_left_out=_total(left_out[split] for split in SPLITS),
        evaluation_sets=sets,
        uid_missing=counts["uid_missing"],
        profiles_cut={
            name: sum(each.counts[name] for each in added.values()) for name in ("tags_left_out", "words_cut")
        },
        blank_lines=counts["blank_lines"],
        rules=config.rules,
        settings=_settings(config),
        splits={
            split: SplitFacts(sessions=sessions[split], examples=sum(file.rows for file in found), files=found)
            for split, found in files.items()
        },
        vocabulary=sizes(*vocabularies),
        persona_related={split: {rule: counts[rule] for rule in RULES} for split, counts in related.items()},
    )


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


def _fingerprint(
    config: PrepareConfig, files: dict[str, list[DataFile]], vocabularies: tuple[Vocabulary, Vocabulary]
) -> str:
    content = {
        "format": FORMAT,
        "rules": to_dict(config.rules),
        "settings": _settings(config),
        "vocabularies": [vocabulary.tokens for vocabulary in vocabularies],
        "rows": {split: [file.digest for file in found] for split, found in files.items()},
    }
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
