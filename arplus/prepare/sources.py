"""What a preparation reads: the files of input and evaluation sets; and what is left out of their folders."""

import logging
import re
from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

from arplus import storage
from arplus.config import PrepareConfig
from arplus.data import manifest
from arplus.data.manifest import FilesLeftOut, LeftOut
from arplus.data.records import REJECT_REASONS
from arplus.errors import UsageError
from arplus.prepare import archives, kinds, lease
from arplus.prepare.tasks import Shard

NAMES_LISTED = 20
"""Names of left-out files that the data card lists; the others are only counted."""
FILES_NAMED = 5
"""Files that an error names."""

_RECORDS = re.compile(
    r".+\.(jsonl|json|ndjson)(\.(gz|zst|bz2|xz))?"
    # Spark's and Hadoop's parts, which may have no ending: part-00000, part-00000-<uuid>-c000.gz, part-r-00000.
    r"|part-([mr]-)?\d{4,}(-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})?([-.]c\d+)?(\.(gz|zst|bz2|xz))?",
    re.IGNORECASE,
)
"""Names of the files that are read from a folder."""
EXPECTED_NAMES = "*.jsonl, *.json, *.ndjson and part-00000, plain or with .gz, .zst, .bz2 or .xz"
"""The same, for people."""
_HEAD_BYTES = 1 << 20

_REASONS = (
    NOT_UTF8 := "the name is not UTF-8: rename it",
    EMPTY_PART := "a name in S3 that holds //, . or ..: rename it",
    OTHER_NAME := "not named as records are",
    OTHER_MANIFEST := "another program's manifest",
    HIDDEN := "hidden",
    DATA_SET := "a prepared data set",
)
"""Why files are left out, the least expected reason first."""

log = logging.getLogger(__name__)


class Found(NamedTuple):
    """The files of a folder."""

    records: list[str]
    """URIs of those that are read, in order of their names."""
    left_out: list[LeftOut]


def find_files(uri: str) -> Found:
    """The record files of a folder, or the one file, whatever its name. Raises :class:`UsageError` for none.

    Left out are files of other names, what a dot or an underscore hides, prepared data sets below the folder,
    unfinished ones too, and the ``manifest.json`` of other programs.
    """
    found = storage.list_files(uri)
    if found == [uri]:
        return Found(found, [])
    paths = [file.removeprefix(storage.join(uri, "")) for file in found]
    prepared = {path.rpartition("/")[0] for file, path in zip(found, paths, strict=True) if _marks_data_set(file, path)}
    if "" in prepared:
        raise UsageError(f"{uri}: is a prepared data set, or an unfinished one; name the raw records it is made from")
    records: list[str] = []
    left_out: Counter[tuple[str, str]] = Counter()
    for file, path in zip(found, paths, strict=True):
        parts = path.split("/")
        above = ["/".join(parts[:i]) for i in range(1, len(parts))]
        if folder := next((folder for folder in above if folder in prepared), None):
            left_out[DATA_SET, f"{folder}/"] += 1
        elif storage.has_empty_part(path):
            left_out[EMPTY_PART, path] += 1
        elif (place := next((i for i, part in enumerate(parts) if part.startswith((".", "_"))), None)) is not None:
            left_out[HIDDEN, path if place == len(above) else f"{above[place]}/"] += 1
        elif not storage.is_utf8(path):
            left_out[NOT_UTF8, path] += 1
        elif parts[-1].lower() == manifest.FILE:
            left_out[OTHER_MANIFEST, path] += 1
        elif not _RECORDS.fullmatch(parts[-1]):
            left_out[OTHER_NAME, path] += 1
        else:
            records.append(file)
    ordered = sorted(left_out.items(), key=lambda item: (_REASONS.index(item[0][0]), item[0][1]))
    return Found(records, [LeftOut(storage.printable(name), n, why) for (why, name), n in ordered])


def _marks_data_set(file: str, path: str) -> bool:
    folder, _, name = path.rpartition("/")
    if (
        not storage.is_utf8(path)
        or storage.has_empty_part(path)
        or any(part.startswith((".", "_")) for part in folder.split("/"))
    ):
        return False
    if name == manifest.FILE:
        return manifest.is_manifest(storage.read_bytes(file))
    return name == lease.FILE and lease.is_lease(storage.read_bytes(file))


def summarise(left_out: list[LeftOut]) -> FilesLeftOut:
    """Left-out files for the manifest: how many, and the first names."""
    return FilesLeftOut(sum(item.files for item in left_out), left_out[:NAMES_LISTED])


@dataclass(frozen=True)
class Source:
    """The input, or an evaluation set."""

    name: str
    """Of the evaluation set; empty for the input."""
    uri: str
    first: int
    """Number of its first file among all files."""
    files: list[str]
    left_out: list[LeftOut]

    def owns(self, shard: Shard) -> bool:
        """Whether the shard comes from it."""
        return self.first <= shard.file < self.first + len(self.files)


def find_sources(config: PrepareConfig) -> list[Source]:
    """The input, then the evaluation sets.

    Raises :class:`UsageError` where one cannot be read, and where the output lies in one: what a preparation leaves
    there would be read as records by the next one.
    """
    found: list[Source] = []
    first = 0
    for name, uri in [("", config.input), *(item.split("=", 1) for item in config.evaluation_set)]:
        uri = storage.absolute(uri)
        if storage.within(config.output, uri):
            raise UsageError(f"--output {config.output}: is or lies in the input {uri}; name a folder beside it")
        files, left_out = find_files(uri)
        names = ", ".join(f"{item.name} ({item.why})" for item in left_out[:FILES_NAMED])
        names += ", …" if len(left_out) > FILES_NAMED else ""
        if not files:
            others = f"; it holds {names}" if names else ""
            raise UsageError(f"{uri}: no record file in this folder; expected {EXPECTED_NAMES}{others}")
        if left_out:
            log.info("%s: files left out: %d; %s", uri, sum(item.files for item in left_out), names)
        if storage.size(files[0]):
            storage.read_range(files[0], 0, 1)  # may be forbidden where listing is not
        found.append(Source(name, uri, first, files, left_out))
        first += len(files)
    return found


class Added(NamedTuple):
    """What was counted in a source."""

    counts: Counter[str]
    """As in :class:`arplus.data.sessions.ParsedBlock`."""
    rejected: Counter[str]
    """By reason."""


def add_up(config: PrepareConfig, source: Source, parsed: list[Shard]) -> Added:
    """A source's counts. Raises :class:`UsageError` where it cannot be used.

    That is one without records, one with more rejects than allowed, and, whatever is allowed, one with a file of which
    every line is rejected: such a file is something else, and its lines say nothing of how many records it holds.
    """
    counts, rejected = Counter[str](), Counter[str]()
    files: dict[int, Counter[str]] = {}
    for shard in parsed:
        if source.owns(shard):
            counts.update(shard.counts)
            rejected.update(shard.rejected)
            files.setdefault(shard.file, Counter()).update(shard.rejected, sessions=shard.counts["sessions"])
    if not counts["records"]:
        raise UsageError(f"{source.uri}: no record in it")
    kept = f"Each is kept with its reason in {storage.join(config.output, 'rejects')}"
    whole = {file: reasons for file, reasons in files.items() if not reasons.pop("sessions") and reasons}
    if whole:
        lines = [_nothing_but_rejects(source.files[i - source.first], whole[i]) for i in sorted(whole)[:FILES_NAMED]]
        if len(whole) > FILES_NAMED:
            lines.append(f"and {len(whole) - FILES_NAMED} more files of which every line is rejected")
        raise UsageError("\n".join([*lines, kept]))
    rejects = sum(rejected.values())
    if rejects / counts["records"] > config.max_reject_share:
        where = "; ".join(f"{n} {reason} ({REJECT_REASONS[reason]})" for reason, n in rejected.most_common(3))
        raise UsageError(
            f"{source.uri}: {rejects} of {counts['records']} records rejected, more than --max-reject-share "
            f"{config.max_reject_share:g} allows: {where}. {kept}"
        )
    return Added(counts, rejected)


def _nothing_but_rejects(file: str, rejected: Counter[str]) -> str:
    """What is wrong with a file, by its most frequent reason and by what it starts with."""
    (reason, n), lines = rejected.most_common(1)[0], rejected.total()
    with archives.opened(file) as content:
        head = b""
        while len(head) < _HEAD_BYTES and (piece := content.read(_HEAD_BYTES - len(head))):
            head += piece
        advice = kinds.no_records(head, file, content.packing)
    return f"{file}: every line is rejected ({n} of {lines}: {reason}, {REJECT_REASONS[reason]}): {advice}"
