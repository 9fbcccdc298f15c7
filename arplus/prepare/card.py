"""The data card: what a prepared data set is made of, as JSON and as one page for people; and as a short table."""

import html
import json
from collections.abc import Mapping
from typing import Any

import numpy as np

from arplus.data.records import MAX_TAGS, MAX_WORD_CHARACTERS, REJECT_REASONS
from arplus.prepare import statistics
from arplus.text import Vocabulary

JSON, PAGE = "data_card.json", "data_card.html"
"""The card's files in a data set."""

_TITLES = {
    "characters_an_utterance": "Characters an utterance (before the cut)",
    "utterances_a_session": "Utterances a session",
    "profiles_a_session": "Profiles a session",
    "tags_a_profile": "Tags a profile",
}
_KEYS = {
    "exact_record": "the same line",
    "dialogue_and_profiles": "the same utterances, speakers and profiles",
    "dialogue": "the same utterances",
}
_CUTS = {
    "tags_left_out": f"tags beyond the first {MAX_TAGS} of a profile",
    "words_cut": f"tags and places longer than {MAX_WORD_CHARACTERS} characters, cut there",
}
"""What is cut off profiles."""
_STYLE = """body{font:15px/1.5 sans-serif;max-width:52em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:.5em 0}td,th{padding:.15em .8em .15em 0;text-align:left;vertical-align:top}
td.n{text-align:right;font-variant-numeric:tabular-nums}i.b{display:inline-block;height:.8em;background:#47a}
h2{margin:1.6em 0 .2em;font-size:1.15em}small{color:#666}"""


def facts(
    manifest: Mapping[str, Any],
    histograms: statistics.Histograms,
    characters_seen: Mapping[str, int],
    characters: Vocabulary,
    persona_words_seen: Mapping[str, int],
    persona_words: Vocabulary,
) -> dict[str, Any]:
    """The card: the manifest's counts, what the sessions look like, and how much the vocabularies cover.

    Histograms are of all sessions that are neither duplicates nor overlaps; coverage is of the training sessions,
    what was seen with its counts.
    """
    counts = ("records", "rejected", "duplicates", "duplicate_key", "sessions", "overlaps", "examples_left_out")
    cut = manifest["rules"]["max_utterance_characters"]
    lengths = histograms["characters_an_utterance"]
    return {
        "fingerprint": manifest["fingerprint"],
        "source": manifest["source"],
        **{
            name: manifest[name]
            for name in (*counts, "evaluation_sets", "uid_missing", "profiles_cut", "blank_lines", "rules", "settings")
        },
        "splits": {
            name: {"sessions": split["sessions"], "examples": split["examples"]}
            for name, split in manifest["splits"].items()
        },
        **{name: _described(histograms[name]) for name in _TITLES},
        "utterances_cut": {"at": cut, "share": _share(int(lengths[cut + 1 :].sum()), int(lengths.sum()))},
        "gender": dict(zip(statistics.GENDERS, histograms["gender"].tolist(), strict=True)),
        "place": dict(zip(statistics.PLACES, histograms["place"].tolist(), strict=True)),
        "vocabulary": {
            "characters": _coverage(characters_seen, characters),
            "persona_words": _coverage(persona_words_seen, persona_words),
        },
    }


def _described(counts: Any) -> dict[str, Any]:
    values = np.flatnonzero(counts)
    return {**statistics.summary(counts), "histogram": {int(v): int(counts[v]) for v in values}}


def _coverage(seen: Mapping[str, int], vocabulary: Vocabulary) -> dict[str, Any]:
    total = sum(seen.values())
    known = sorted((n for token, n in seen.items() if token in vocabulary), reverse=True)
    sums = np.cumsum([0, *known])
    return {
        "size": vocabulary.size,
        "seen": total,
        "distinct_seen": len(seen),
        "coverage": _share(int(sums[-1]), total),
        "coverage_of_most_frequent": {
            n: _share(int(sums[n]), total) for n in (100, 1000, 2000, 3000, 5000) if n < len(sums)
        },
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


def to_json(card: Mapping[str, Any]) -> bytes:
    """The card for programs."""
    return (json.dumps(card, ensure_ascii=False, indent=2) + "\n").encode()


def to_html(card: Mapping[str, Any]) -> bytes:
    """The card as one page that needs nothing else."""
    rejected = sum(card["rejected"].values())
    removed = card["duplicates"][card["duplicate_key"]]
    page = [
        "<h1>Data card</h1>",
        f"<p><small>Fingerprint {card['fingerprint']}, made from {html.escape(card['source']['input'])} "
        f"({card['source']['files']} file{'s'[: card['source']['files'] != 1]}).</small></p>",
        f"<p>{card['records']:,} records = {rejected:,} rejected + {removed:,} duplicates + {card['sessions']:,} "
        "sessions.</p>",
        "<h2>Splits</h2>",
        _table(
            ("", "sessions", "examples"),
            [(name, split["sessions"], split["examples"]) for name, split in card["splits"].items()],
        ),
    ]
    if card["overlaps"]:
        rows = [(f"in {name}", n) for name, n in card["overlaps"].items()]
        page += ["<p>Sessions whose dialogue is in an evaluation set are in no other split:</p>", _table((), rows)]
    page += [
        *_left_out_html(card),
        "<h2>Duplicates</h2>",
        _table(
            ("by definition", "repeated", ""),
            [
                (_KEYS[key], n, "removed" if key == card["duplicate_key"] else "only counted")
                for key, n in card["duplicates"].items()
            ],
        ),
        "<h2>Rejected lines</h2>",
        _table((), [(REJECT_REASONS[reason], n) for reason, n in card["rejected"].items()]) or "<p>None.</p>",
        "<h2>Pairs of utterances that are no example</h2>",
        _table((), [(reason.replace("_", " "), n) for reason, n in card["examples_left_out"].items()]),
        f"<p>{card['uid_missing']:,} sessions do not say who speaks; alternation was assumed.</p>",
        *(f"<p>{n:,} {_CUTS[name]}.</p>" for name, n in card["profiles_cut"].items()),
    ]
    for name, title in _TITLES.items():
        page += [f"<h2>{title}</h2>", _distribution(card[name])]
        if name == "characters_an_utterance":
            cut = card["utterances_cut"]
            page.append(f"<p>{cut['share']:.1%} are longer than {cut['at']} and cut there.</p>")
    for name, title in (("gender", "Genders of profiles"), ("place", "Places of profiles")):
        total = sum(card[name].values()) or 1
        page += [f"<h2>{title}</h2>", _table((), [(v, n, f"{n / total:.1%}") for v, n in card[name].items()])]
    page.append("<h2>Vocabularies</h2>")
    for name, facts in card["vocabulary"].items():
        most = [(f"the {n:,} most frequent", f"{share:.2%}") for n, share in facts["coverage_of_most_frequent"].items()]
        page += [
            f"<p>{name.replace('_', ' ')}: {facts['size']:,} with the nine special tokens, of "
            f"{facts['distinct_seen']:,} seen in the training sessions; "
            f"they cover {facts['coverage']:.3%} of {facts['seen']:,}.</p>",
            _table((), most),
        ]
    body = "\n".join(page)
    text = f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Data card</title><style>{_STYLE}</style>\n'
    return f"{text}<body>\n{body}\n</body></html>\n".encode()


def _left_out(facts: Mapping[str, Any]) -> list[tuple[str, int, str]]:
    """Rows for the files left out of the input and of the evaluation sets; none where there are none."""
    sets = {name: each["files_left_out"] for name, each in facts["evaluation_sets"].items()}
    rows = []
    for name, found in {"": facts["source"]["files_left_out"], **sets}.items():
        if not found["files"]:
            continue
        rows.append((f"files left out of {name}" if name else "files left out", found["files"], "not read"))
        rows += [(f"  {item['name']}", item["files"], item["why"]) for item in found["names"]]
        if more := found["files"] - sum(item["files"] for item in found["names"]):
            rows.append(("  others", more, "not listed"))
    return rows


def _left_out_html(card: Mapping[str, Any]) -> list[str]:
    return ["<h2>Files left out</h2>", _table((), _left_out(card)) or "<p>None.</p>"]


def _table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    if not rows:
        return ""
    lines = ["".join(f"<th>{title}</th>" for title in head)] if head else []
    lines += [
        "".join(f'<td class="n">{v:,}</td>' if isinstance(v, int) else f"<td>{html.escape(v)}</td>" for v in row)
        for row in rows
    ]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _distribution(facts: Mapping[str, Any]) -> str:
    """A line of quantiles, and at most 16 bars."""
    if not facts["n"]:
        return "<p>None.</p>"
    names = ("mean", "median", "p75", "p90", "p95", "p99", "max")
    line = ", ".join(f"{name} {facts[name]:g}" for name in names)
    step = -(-(facts["p99"] + 1) // 15)
    bars = np.zeros(16, np.int64)
    for value, n in facts["histogram"].items():
        bars[min(15, int(value) // step)] += n
    rows = []
    for i in range(int(np.flatnonzero(bars)[-1]) + 1):
        label = f"{i * step}" if step == 1 else f"{i * step} to {i * step + step - 1}"
        label = f"{15 * step} and more" if i == 15 else label
        share = bars[i] / facts["n"]
        bar = f'<i class="b" style="width:{30 * share / (bars.max() / facts["n"]):.2f}em"></i>'
        rows.append(f'<tr><td>{label}</td><td class="n">{share:.1%}</td><td>{bar}</td></tr>')
    return f"<p>{line}</p><table>{''.join(rows)}</table>"


def report(manifest: dict[str, Any]) -> str:
    """The counts of a manifest as a short table for people."""
    rejected = sum(manifest["rejected"].values())
    removed = manifest["duplicates"][manifest["duplicate_key"]]
    rows = [
        *_left_out(manifest),
        ("records", manifest["records"], ""),
        ("rejected", rejected, ", ".join(f"{n} {reason}" for reason, n in manifest["rejected"].items())),
        ("duplicates removed", removed, ", ".join(f"{n} by {key}" for key, n in manifest["duplicates"].items())),
        ("sessions", manifest["sessions"], ""),
    ]
    for split, split_facts in manifest["splits"].items():
        rows.append((f"  {split}", split_facts["sessions"], f"{split_facts['examples']:,} examples"))
    for name, n in manifest["overlaps"].items():
        rows.append((f"  kept out: in {name}", n, "sessions whose dialogue is in that evaluation set"))
    for reason, n in manifest["examples_left_out"].items():
        rows.append((f"left out: {reason}", n, "pairs of utterances"))
    rows += [(name.replace("_", " "), n, _CUTS[name]) for name, n in manifest["profiles_cut"].items() if n]
    for name, size in manifest["vocabulary"].items():
        rows.append((f"vocabulary: {name}", size, "with the nine special tokens"))
    lines = [f"{name:<32}{number:>12,}  {note}".rstrip() for name, number, note in rows]
    lines.append(f"{'fingerprint':<32}{manifest['fingerprint']}")
    valid = manifest["splits"]["valid"]
    if not valid["examples"]:
        missing = "example" if valid["sessions"] else "session"
        lines.append(f"validation: no {missing}; training will keep its last checkpoint")
    return "\n".join(lines)
