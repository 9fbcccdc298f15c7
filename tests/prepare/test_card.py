"""The data card says what was counted."""

import json
from typing import Any

import numpy as np
import pytest

from arplus.data.sessions import parse_block
from arplus.prepare import card, statistics
from arplus.text import Vocabulary

RECORDS = [
    {
        "dialog": ["我 我 我", "你" * 40],
        "profile": [
            {"tag": ["a;b"], "loc": "其他", "gender": "male"},
            {"tag": [""], "loc": "", "gender": ""},
            {"tag": ["c"], "loc": "海外 美国", "gender": "female"},
        ],
        "uid": [0, 1],
    },
    {"dialog": ["", "𠮷", "好"], "profile": [{"tag": [""], "loc": "四川 成都", "gender": "female"}], "uid": [0, 0, 0]},
]
MANIFEST: dict[str, Any] = {
    "fingerprint": "abc",
    "source": {
        "input": "<raw> & all",
        "files": 1,
        "files_left_out": {"files": 45, "names": [{"name": "<a>.txt", "files": 1, "why": "not named as records are"}]},
    },
    "profiles_cut": {"tags_left_out": 19_900, "words_cut": 0},
    "records": 12,
    "rejected": {"invalid_json": 3},
    "duplicates": {"exact_record": 5, "dialogue_and_profiles": 7, "dialogue": 8},
    "duplicate_key": "dialogue_and_profiles",
    "sessions": 2,
    "overlaps": {"random": 1},
    "examples_left_out": {"empty_response": 4},
    "evaluation_sets": {},
    "uid_missing": 0,
    "blank_lines": 0,
    "rules": {"max_utterance_characters": 15},
    "settings": {},
    "splits": {"train": {"sessions": 1, "examples": 9, "files": []}},
}


@pytest.fixture(scope="module")
def histograms() -> statistics.Histograms:
    lines = "\n".join(json.dumps(record) for record in RECORDS).encode()
    table = parse_block(lines, file=0, first_line=0, duplicate_key="dialogue").sessions
    total = statistics.empty()
    for part in (table[:1], table[1:]):
        statistics.add(total, statistics.histograms(part.combine_chunks()))
    return total


def counts(histogram: np.ndarray) -> dict[int, int]:
    return {int(i): int(histogram[i]) for i in np.flatnonzero(histogram)}


def test_histograms_by_hand(histograms: statistics.Histograms) -> None:
    assert counts(histograms["characters_an_utterance"]) == {0: 1, 1: 2, 3: 1, 40: 1}
    assert counts(histograms["utterances_a_session"]) == {2: 1, 3: 1}
    assert counts(histograms["profiles_a_session"]) == {1: 1, 3: 1}
    assert counts(histograms["tags_a_profile"]) == {0: 2, 1: 1, 2: 1}
    assert dict(zip(statistics.GENDERS, histograms["gender"], strict=True)) == {"missing": 1, "男": 1, "女": 2}
    assert histograms["place"].tolist() == [1, 1, 1, 1]


def test_long_values_count_as_the_last_one() -> None:
    table = parse_block(
        json.dumps({**RECORDS[0], "dialog": ["a" * 5000] * 150, "uid": [0] * 150}).encode(),
        file=0,
        first_line=0,
        duplicate_key="dialogue",
    ).sessions
    found = statistics.histograms(table)
    assert counts(found["characters_an_utterance"]) == {2000: 150}
    assert counts(found["utterances_a_session"]) == {100: 1}


def test_a_summary_has_the_quantiles() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1001)
    summary = statistics.summary(np.bincount(values))
    assert summary["mean"] == pytest.approx(values.mean(), abs=1e-3)
    assert summary["median"] == np.median(values)
    assert summary["p90"] == np.quantile(values, 0.9, method="inverted_cdf")
    assert summary["max"] == values.max()
    assert statistics.summary(np.zeros(4, np.int64))["mean"] == 0


def test_the_card_says_how_much_the_vocabularies_cover(histograms: statistics.Histograms) -> None:
    seen = {"我": 6, "你": 3, "龘": 1}
    facts = card.facts(MANIFEST, histograms, seen, Vocabulary(["我", "你", "x"]), {"男": 1}, Vocabulary(["男"]))
    assert facts["vocabulary"]["characters"]["coverage"] == 0.9
    assert facts["vocabulary"]["characters"]["distinct_seen"] == 3
    assert facts["utterances_cut"] == {"at": 15, "share": 0.2}
    assert json.loads(card.to_json(facts))["splits"] == {"train": {"sessions": 1, "examples": 9}}
    page = card.to_html(facts).decode()
    assert "12 records = 3 rejected + 7 duplicates + 2 sessions" in page
    assert "the line is not JSON" in page
    assert "&lt;raw&gt; &amp; all" in page
    assert "90.000%" in page
    assert "in random" in page
    assert '&lt;a&gt;.txt</td><td class="n">1</td><td>not named as records are' in page
    assert 'others</td><td class="n">44</td>' in page
    assert "19,900 tags beyond the first 100 of a profile" in page
    assert facts["source"]["files_left_out"]["files"] == 45
    assert facts["profiles_cut"] == {"tags_left_out": 19_900, "words_cut": 0}


def test_a_card_of_nothing_is_a_card() -> None:
    empty = {**MANIFEST, "rejected": {}, "overlaps": {}, "examples_left_out": {}}
    facts = card.facts(empty, statistics.empty(), {}, Vocabulary(["x"]), {}, Vocabulary(["x"]))
    assert b"None." in card.to_html(facts)
    assert facts["vocabulary"]["characters"]["coverage"] == 0
