"""The data card: what a data set is made of, as JSON, as a page (``templates/data_card.html``) and as a short table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from arplus import pages, storage
from arplus.data.labels import RULES
from arplus.data.manifest import Manifest
from arplus.data.records import MAX_TAGS, MAX_WORD_CHARACTERS, REJECT_REASONS
from arplus.prepare.statistics import MEANINGS, Distribution, Histograms
from arplus.text import Vocabulary

JSON, PAGE = "data_card.json", "data_card.html"
"""The card's files in a data set."""

_TITLES = {
    "characters_an_utterance": "Characters per utterance (before the cut)",
    "utterances_a_session": "Utterances per session",
    "profiles_a_session": "Profiles per session",
    "tags_a_profile": "Tags per profile",
}
_KEYS = {
    "exact_record": "the same line",
    "dialogue_and_profiles": "the same utterances, speakers and profiles",
    "dialogue": "the same utterances",
}
_CUTS = {
    "tags_left_out": f"tags beyond the first {MAX_TAGS} of a profile",
    "words_cut": f"ends of tags and places beyond {MAX_WORD_CHARACTERS} characters",
}
"""What is cut off profiles."""
_BARS = 16


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How much of what was seen in the training sessions a vocabulary has."""

    size: int
    seen: int
    distinct_seen: int
    coverage: float
    coverage_of_most_frequent: dict[int, float]

    @classmethod
    def of(cls, seen: Mapping[str, int], vocabulary: Vocabulary) -> "Coverage":
        """By how often each token was seen."""
        total = sum(seen.values())
        known = sorted((n for token, n in seen.items() if token in vocabulary), reverse=True)
        sums = np.cumsum([0, *known])
        most = {n: _share(int(sums[n]), total) for n in (100, 1000, 2000, 3000, 5000) if n < len(sums)}
        return cls(
            size=vocabulary.size,
            seen=total,
            distinct_seen=len(seen),
            coverage=_share(int(sums[-1]), total),
            coverage_of_most_frequent=most,
        )


@dataclass(frozen=True, kw_only=True)
class DataCard:
    """The manifest's counts, what the sessions look like, and how much the vocabularies cover."""

    manifest: Manifest
    histograms: Histograms
    """Of all sessions that are neither duplicates nor overlaps."""
    vocabulary: dict[str, Coverage]

    @property
    def distributions(self) -> dict[str, Distribution]:
        """What the sessions look like, by name."""
        return {name: Distribution.of(self.histograms[name]) for name in _TITLES}

    @property
    def meanings(self) -> dict[str, dict[str, int]]:
        """How many profiles have which gender, and which kind of place."""
        return {name: dict(zip(MEANINGS[name], self.histograms[name].tolist(), strict=True)) for name in MEANINGS}

    @property
    def utterances_cut(self) -> dict[str, float]:
        """The share of the utterances that are longer than the rules keep."""
        cut, lengths = self.manifest.rules.max_utterance_characters, self.histograms["characters_an_utterance"]
        return {"at": cut, "share": _share(int(lengths[cut + 1 :].sum()), int(lengths.sum()))}

    def to_json(self) -> bytes:
        """The card for programs."""
        facts = asdict(self.manifest)
        for split in facts["splits"].values():
            del split["files"]
        facts |= {name: asdict(each) for name, each in self.distributions.items()}
        facts |= {"utterances_cut": self.utterances_cut, **self.meanings}
        facts["vocabulary"] = {name: asdict(each) for name, each in self.vocabulary.items()}
        return storage.as_json(facts).encode()

    def to_html(self) -> bytes:
        """The card as one page."""
        found = self.manifest
        return pages.render(
            "data_card.html",
            title="Data card",
            card=self,
            manifest=found,
            cuts=_CUTS,
            splits=[(name, split.sessions, split.examples) for name, split in found.splits.items()],
            persona_related=_persona_related(found),
            rules=RULES,
            overlaps=[(f"in {name}", n) for name, n in found.overlaps.items()],
            left_out=_left_out(found),
            duplicates=[
                (_KEYS[key], n, "removed" if key == found.duplicate_key else "only counted")
                for key, n in found.duplicates.items()
            ],
            rejected=[(REJECT_REASONS[reason], n) for reason, n in found.rejected.items()],
            examples_left_out=[(reason.replace("_", " "), n) for reason, n in found.examples_left_out.items()],
            distributions=[(_TITLES[name], each, _bars(each)) for name, each in self.distributions.items()],
        ).encode()


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def _persona_related(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Rows for the examples about the responder's persona: their number, their share, and by which rules."""
    rows = []
    for split, rules in manifest.persona_related.items():
        n, examples = sum(rules.values()), manifest.splits[split].examples
        by_rule = ", ".join(f"{_share(count, examples):.2%} {rule}" for rule, count in rules.items())
        rows.append((split, n, f"{_share(n, examples):.2%} of the examples: {by_rule}"))
    return rows


def _left_out(manifest: Manifest) -> list[tuple[str, int, str]]:
    """Rows for the files left out of the input and of the evaluation sets; none where there are none."""
    rows: list[tuple[str, int, str]] = []
    sets = {name: source.files_left_out for name, source in manifest.evaluation_sets.items()}
    for name, found in {"": manifest.source.files_left_out, **sets}.items():
        if found.files:
            rows.append((f"files left out of {name}" if name else "files left out", found.files, "not read"))
        rows += [(f"  {item.name}", item.files, item.why) for item in found.names]
        if more := found.files - sum(item.files for item in found.names):
            rows.append(("  others", more, "not listed"))
    return rows


def _bars(found: Distribution) -> list[tuple[str, float, str]]:
    """At most :data:`_BARS` bars: the values that each stands for, their share, and the bar's length (0 … 1)."""
    step = -(-(found.p99 + 1) // (_BARS - 1))
    bars = np.zeros(_BARS, np.int64)
    for value, n in found.histogram.items():
        bars[min(_BARS - 1, value // step)] += n
    rows = []
    for i, n in enumerate(np.trim_zeros(bars, "b").tolist()):
        label = f"{i * step}" if step == 1 else f"{i * step} to {i * step + step - 1}"
        label = f"{i * step} and more" if i == _BARS - 1 else label
        rows.append((label, n / found.n, f"{n / bars.max():.3f}"))
    return rows


def report(manifest: Manifest) -> str:
    """The counts of a manifest as a short table for people."""
    removed = manifest.duplicates[manifest.duplicate_key]
    rows = [
        *_left_out(manifest),
        ("records", manifest.records, ""),
        ("rejected", sum(manifest.rejected.values()), ", ".join(f"{n} {why}" for why, n in manifest.rejected.items())),
        ("duplicates removed", removed, ", ".join(f"{n} by {key}" for key, n in manifest.duplicates.items())),
        ("sessions", manifest.sessions, ""),
        *((f"  {name}", split.sessions, f"{split.examples:,} examples") for name, split in manifest.splits.items()),
        *(
            (f"  kept out: in {name}", n, "sessions whose dialogue is in that evaluation set")
            for name, n in manifest.overlaps.items()
        ),
        *((f"left out: {reason}", n, "pairs of utterances") for reason, n in manifest.examples_left_out.items()),
        *((f"about the persona: {split}", n, shares) for split, n, shares in _persona_related(manifest)),
        *((name.replace("_", " "), n, _CUTS[name]) for name, n in manifest.profiles_cut.items() if n),
        *(
            (f"vocabulary: {name}", size, "with the nine special tokens")
            for name, size in asdict(manifest.vocabulary).items()
        ),
    ]
    lines = [f"{name:<32}{number:>12,}  {note}".rstrip() for name, number, note in rows]
    lines.append(f"{'fingerprint':<32}{manifest.fingerprint}")
    valid = manifest.splits["valid"]
    if not valid.examples:
        missing = "example" if valid.sessions else "session"
        lines.append(f"validation: no {missing}; training will keep its last checkpoint")
    return "\n".join(lines)
