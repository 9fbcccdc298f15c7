"""A prepared data set, as it is read for training and evaluation. :mod:`arplus.prepare.pipeline` makes it."""

from dataclasses import dataclass, replace

from arplus import storage
from arplus.config import ExampleRules, ModelConfig, VocabularySizes
from arplus.data.manifest import Manifest
from arplus.errors import UsageError
from arplus.text import Vocabulary, sizes


@dataclass(frozen=True)
class RowGroup:
    """A row group of a Parquet file: the unit that the feed reads."""

    file: str
    """URI of the file."""
    index: int
    rows: int


@dataclass(frozen=True)
class Split:
    """One split's examples, in the order of its files."""

    name: str
    examples: int
    sessions: int
    """Of the first examples of a split only an estimate, by the examples per session."""
    row_groups: tuple[RowGroup, ...]


@dataclass(frozen=True)
class Dataset:
    """A prepared data set; made by :meth:`open`."""

    uri: str
    manifest: Manifest
    characters: Vocabulary
    persona_words: Vocabulary

    @classmethod
    def open(cls, uri: str) -> "Dataset":
        """Reads manifest and vocabularies. Raises :class:`UsageError` where ``uri`` is not a prepared data set."""
        manifest = Manifest.read(uri)
        names = ("characters", "persona_words")
        return cls(uri, manifest, *(Vocabulary.load(storage.join(uri, "vocabulary", f"{name}.txt")) for name in names))

    @property
    def rules(self) -> ExampleRules:
        """How its sessions became examples; every checkpoint of a model that is trained on it carries them on."""
        return self.manifest.rules

    @property
    def fingerprint(self) -> str:
        """Digest of the rules, the vocabularies and every row in order."""
        return self.manifest.fingerprint

    @property
    def sizes(self) -> VocabularySizes:
        """Sizes of the two vocabularies."""
        return sizes(self.characters, self.persona_words)

    def check_splits(self, *names: str, why: str) -> None:
        """Raises :class:`UsageError`, which says ``why``, where one of these splits has no example."""
        for name in names:
            if not self.split(name).examples:
                raise UsageError(
                    f"--data {self.uri}: has no example in the split {name}, and {why}; prepare it again "
                    f"with a larger --{name}"
                )

    def check_vocabularies(self, characters: Vocabulary, persona_words: Vocabulary, *, of: str) -> None:
        """Raises :class:`UsageError` where a model's vocabularies are not these to the token; ``of`` says whose."""
        for kind, mine, theirs in (
            ("characters", self.characters.tokens, characters.tokens),
            ("persona words", self.persona_words.tokens, persona_words.tokens),
        ):
            if mine != theirs:
                raise UsageError(
                    f"--data {self.uri}: its {len(mine)} {kind} are not the {len(theirs)} of {of}; prepare the data "
                    "with the vocabularies that it was trained on (jobs/prepare.py --character-vocabulary … "
                    "--persona-vocabulary …, both in vocabulary/ of the data set before)"
                )

    def check_labels(self, *models: ModelConfig, training: bool = True) -> None:
        """Raises :class:`UsageError` where one of these models predicts a weight, and has nothing to learn that from.

        Or, where it is not trained, to be measured by.
        """
        if all(model.persona_weight == "one" for model in models):
            return
        labels, predicted = self.manifest.persona_related, "--model.persona-weight predicted"
        if not labels:
            raise UsageError(
                f"--data {self.uri}: has no labels for {predicted}, since an earlier version made it; prepare it again"
            )
        if training and not any(labels["train"].values()):
            raise UsageError(
                f"--data {self.uri}: no training example is about the responder's persona, so that {predicted} would "
                "learn a = 0 for all; train with --model.persona-weight one"
            )

    def split(self, name: str, first: int | None = None) -> Split:
        """A split by name, or its ``first`` examples. Raises :class:`UsageError` for an unknown one, or one too small.

        Files are in order of example ids, which are hashes, so the first examples are random ones.
        """
        splits = self.manifest.splits
        if name not in splits:
            raise UsageError(f"{self.uri}: no split {name!r}; it has {', '.join(splits)}")
        groups = tuple(
            RowGroup(storage.join(self.uri, file.path), index, rows)
            for file in splits[name].files
            for index, rows in enumerate(file.row_groups)
        )
        split = Split(name, splits[name].examples, splits[name].sessions, groups)
        if first is None:
            return split
        if first > split.examples:
            raise UsageError(f"{self.uri}: the split {name} has {split.examples:,} examples, not {first:,}")
        return _first(split, first)


def _first(split: Split, examples: int) -> Split:
    groups, rest = [], examples
    for group in split.row_groups:
        if rest <= 0:
            break
        groups.append(replace(group, rows=min(group.rows, rest)))
        rest -= group.rows
    sessions = round(split.sessions * examples / split.examples)
    return Split(split.name, examples, sessions, tuple(groups))
