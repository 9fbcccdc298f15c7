"""The data card says what was counted."""

import json
from dataclasses import replace

import numpy as np
import pytest
from helpers.prepared import make_manifest

from arplus.data.manifest import FilesLeftOut, InputFacts, LeftOut, SplitFacts
from arplus.data.sessions import parse_block
from arplus.prepare import statistics
from arplus.prepare.card import Coverage, DataCard
from arplus.prepare.statistics import MEANINGS, Distribution
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
MANIFEST = make_manifest(
    {"train": SplitFacts(sessions=1, examples=9, files=[])},
    source=InputFacts(
        input="<raw> & all",
        files=1,
        files_left_out=FilesLeftOut(45, [LeftOut("<a>.txt", 1, "not named as records are")]),
    ),
    profiles_cut={"tags_left_out": 19_900, "words_cut": 0},
    records=12,
    rejected={"invalid_json": 3},
    duplicates={"exact_record": 5, "dialogue_and_profiles": 7, "dialogue": 8},
    duplicate_key="dialogue_and_profiles",
    sessions=2,
    overlaps={"random": 1},
    examples_left_out={"empty_response": 4},
    persona_related={"train": {"asked": 2, "claimed": 0, "named": 1}},
)


@pytest.fixture(scope="module")
def histograms() -> statistics.Histograms:
    lines = "\n".join(json.dumps(record) for record in RECORDS).encode()
    table = parse_block(lines, file=0, first_line=0, duplicate_key="dialogue").sessions
    total = statistics.empty()
    for part in (table[:1], table[1:]):
        for name, seen in statistics.histograms(part).items():
            total[name] += seen
    return total


def counts(histogram: np.ndarray) -> dict[int, int]:
    return {int(i): int(histogram[i]) for i in np.flatnonzero(histogram)}


def test_histograms_by_hand(histograms: statistics.Histograms) -> None:
    assert counts(histograms["characters_an_utterance"]) == {0: 1, 1: 2, 3: 1, 40: 1}
    assert counts(histograms["utterances_a_session"]) == {2: 1, 3: 1}
    assert counts(histograms["profiles_a_session"]) == {1: 1, 3: 1}
    assert counts(histograms["tags_a_profile"]) == {0: 2, 1: 1, 2: 1}
    assert dict(zip(MEANINGS["gender"], histograms["gender"], strict=True)) == {"missing": 1, "男": 1, "女": 2}
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


def test_a_distribution_has_the_quantiles() -> None:
    values = np.random.default_rng(0).integers(0, 50, 1001)
    found = Distribution.of(np.bincount(values))
    assert found.mean == pytest.approx(values.mean(), abs=1e-3)
    assert found.median == np.median(values)
    assert found.p90 == np.quantile(values, 0.9, method="inverted_cdf")
    assert found.max == values.max()
    assert Distribution.of(np.zeros(4, np.int64)) == Distribution()


def test_the_card_says_how_much_the_vocabularies_cover(histograms: statistics.Histograms) -> None:
    seen = {"我": 6, "你": 3, "龘": 1}
    coverage = {
        "characters": Coverage.of(seen, Vocabulary(["我", "你", "x"])),
        "persona_words": Coverage.of({"男": 1}, Vocabulary(["男"])),
    }
    card = DataCard(manifest=MANIFEST, histograms=histograms, vocabulary=coverage)
    assert (coverage["characters"].coverage, coverage["characters"].distinct_seen) == (0.9, 3)
    facts = json.loads(card.to_json())
    assert facts["utterances_cut"] == {"at": 15, "share": 0.2}
    assert facts["splits"] == {"train": {"sessions": 1, "examples": 9}}
    page = card.to_html().decode()
    assert "12 records = 3 rejected + 7 duplicates + 2 sessions" in page
    assert "the line is not JSON" in page
    assert "&lt;raw&gt; &amp; all" in page
    assert "90.000%" in page
    assert "in random" in page
    assert '&lt;a&gt;.txt</td><td class="n">1</td><td>not named as records are' in page
    assert 'others</td><td class="n">44</td>' in page
    assert '<td class="n">3</td><td>33.33% of the examples: 22.22% asked, 0.00% claimed, 11.11% named</td>' in page
    assert facts["persona_related"] == {"train": {"asked": 2, "claimed": 0, "named": 1}}
    assert "19,900 tags beyond the first 100 of a profile" in page
    assert facts["source"]["files_left_out"]["files"] == 45
    assert facts["profiles_cut"] == {"tags_left_out": 19_900, "words_cut": 0}


def test_a_card_of_nothing_is_a_card() -> None:
    empty = replace(MANIFEST, rejected={}, overlaps={}, examples_left_out={})
    coverage = Coverage.of({}, Vocabulary(["x"]))
    card = DataCard(manifest=empty, histograms=statistics.empty(), vocabulary={"characters": coverage})
    assert b"None." in card.to_html()
    assert coverage.coverage == 0
