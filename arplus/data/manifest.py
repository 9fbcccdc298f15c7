"""What a prepared data set says of itself. It is written last: a folder without a manifest is not a data set."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from arplus import storage
from arplus.config import ExampleRules, VocabularySizes, from_dict
from arplus.config.jobs import DuplicateKey
from arplus.errors import UsageError

FORMAT = 2
FILE = "manifest.json"


@dataclass(frozen=True)
class LeftOut:
    """A file that is not read, or a folder of them."""

    name: str
    """Below the input; a folder's ends with a slash."""
    files: int
    why: str


@dataclass(frozen=True)
class FilesLeftOut:
    """The files of a source that are not read."""

    files: int
    names: list[LeftOut]
    """The first ones."""


@dataclass(frozen=True, kw_only=True)
class InputFacts:
    """The input."""

    input: str
    """Its URI."""
    files: int
    files_left_out: FilesLeftOut


@dataclass(frozen=True, kw_only=True)
class EvaluationSetFacts:
    """An evaluation set."""

    records: int
    rejected: dict[str, int]
    """By reason."""
    examples_left_out: dict[str, int]
    """By reason."""
    source: str
    """Its URI."""
    files_left_out: FilesLeftOut


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A file of encoded examples."""

    path: str
    """Below the data set's folder."""
    rows: int
    row_groups: list[int]
    """Rows of each."""
    digest: str
    """Of its rows in order, whatever their encoding."""


@dataclass(frozen=True, kw_only=True)
class SplitFacts:
    """A split."""

    sessions: int
    examples: int
    files: list[DataFile]
    """In order."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """All that is known of a data set; records = rejected + duplicates by the chosen key + sessions."""

    fingerprint: str
    """Digest of the rules, the vocabularies and every row in order."""
    source: InputFacts
    records: int
    rejected: dict[str, int]
    """By reason."""
    duplicates: dict[DuplicateKey, int]
    """By each definition."""
    duplicate_key: DuplicateKey
    """The definition by which they were removed."""
    sessions: int
    """Of the splits of the input and the overlaps."""
    overlaps: dict[str, int]
    """By evaluation set, sessions of the input with a dialogue of it, which are in no split."""
    examples_left_out: dict[str, int]
    """Pairs of utterances of the input by reason."""
    evaluation_sets: dict[str, EvaluationSetFacts]
    uid_missing: int
    """Sessions whose speakers were assumed."""
    profiles_cut: dict[str, int]
    """What was cut off profiles, as :class:`arplus.data.records.Profile` counts it."""
    blank_lines: int
    rules: ExampleRules
    settings: dict[str, Any]
    """Those that decide the content beside the rules."""
    splits: dict[str, SplitFacts]
    vocabulary: VocabularySizes
    persona_related: dict[str, dict[str, int]] = field(default_factory=dict)
    """By split, the examples about the responder's persona by the rule that says so; empty in data sets of before."""

    @classmethod
    def read(cls, uri: str) -> "Manifest":
        """The manifest of a data set. Raises :class:`UsageError` where ``uri`` is not a prepared data set."""
        path = storage.join(uri, FILE)
        if not storage.exists(path):
            raise UsageError(f"{uri}: not a prepared data set (no {FILE}); make one with jobs/prepare.py")
        found = storage.read_json(path)
        if not _is_ours(found):
            raise UsageError(f"{uri}: not a prepared data set ({FILE} is not ours); make one with jobs/prepare.py")
        if found["format"] != FORMAT:
            raise UsageError(f"{path}: format {found['format']!r}; this version reads {FORMAT}: prepare it again")
        return from_dict(cls, {key: value for key, value in found.items() if key != "format"}, source=path)

    def write(self, uri: str) -> None:
        """Makes the folder ``uri`` a data set."""
        storage.write_json(storage.join(uri, FILE), {"format": FORMAT, **asdict(self)})


def is_manifest(data: bytes) -> bool:
    """Whether a file called :data:`FILE` is ours: many programs call theirs so."""
    try:
        return _is_ours(json.loads(data))
    except (ValueError, RecursionError):  # of ours, what a broken copy has left of it
        return data.startswith(b'{\n  "format": ') and b'\n  "fingerprint": ' in data


def _is_ours(manifest: Any) -> bool:
    return isinstance(manifest, dict) and {"format", "fingerprint", "splits"} <= manifest.keys()
