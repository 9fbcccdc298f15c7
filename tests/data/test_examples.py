"""Every field of every example, against a slow oracle written from the paper's rules."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arplus.config import ExampleRules
from arplus.data.examples import LIST_COLUMNS, Encoded, encode_sessions
from arplus.data.labels import RULES
from arplus.data.personas import Persona, contradicts, persona_question, split_place
from arplus.data.ragged import ranges
from arplus.data.records import Profile, Session
from arplus.data.sessions import to_table
from arplus.text import Vocabulary

CHARACTERS = Vocabulary(list("性别男女地址兴趣的我𠮷a?福建厦门"))
WORDS = Vocabulary(["性别", "地址", "兴趣", "男", "女", "福建厦门", "我的", "a"])


def encode(sessions: list[Session], **options: Any) -> Encoded:
    keys = b"".join(s.record_hash for s in sessions)
    table = to_table(sessions, np.arange(len(sessions)), keys)
    return encode_sessions(table, CHARACTERS, WORDS, ExampleRules(**options))


def rule_of(question: str, reply: str, words: list[str]) -> int:
    """The rules for labels as the guide says them, one after the other."""
    gender, place, *tags = words
    if persona_question(question):
        return 1
    if contradicts(reply, Persona(gender, place, tuple(tags))) is not None:
        return 2
    names = [*split_place(place), *(tag for tag in tags if len(tag) >= 2)]
    return 3 if any(name and name in reply for name in names) else 0


def oracle(sessions: list[Session], utterance: int, context: int, drop: bool) -> tuple[list[dict], Counter[str]]:
    rows, left_out = [], Counter[str]()
    letter = {c: i for i, c in enumerate(CHARACTERS.tokens)}
    word = {w: i for i, w in enumerate(WORDS.tokens)}

    def letters(text: str) -> list[int]:
        return [letter.get(c, CHARACTERS.special.unk) for c in text] or [CHARACTERS.special.unk]

    def words(items: list[str]) -> list[int]:
        return [word.get(item, WORDS.special.unk) for item in items]

    for number, session in enumerate(sessions):
        cut = [u[:utterance] for u in session.utterances]
        for i in [len(cut) - 2] if session.has_reference else range(0, len(cut) - 1, 2):
            turns = range(max(0, i + 1 - context), i + 1)
            speakers = [session.speakers[j] for j in turns]
            responder = session.speakers[i + 1]
            people = list(dict.fromkeys([responder, *speakers]))
            persona = [session.profiles[p].words for p in people]
            if not cut[i + 1]:
                left_out["empty_response"] += 1
                continue
            if not any(cut[j] for j in turns):
                left_out["empty_context"] += 1
                continue
            if drop and any(not items[0] or not items[1] for items in persona):
                left_out["incomplete_persona"] += 1
                continue
            plain = [[items[0], items[1], *(items[2:] or [""])] for items in persona]
            keyed = ["性别", plain[0][0], "地址", plain[0][1], "兴趣", *plain[0][2:]]
            spelled = [[c for item in items for c in letters(item)] for items in plain]
            ids = [([letter.get(c, CHARACTERS.special.unk) for c in cut[j]], CHARACTERS.special.sep) for j in turns]
            rows.append(
                {
                    "session": number,
                    "response_index": i + 1,
                    "context": [x for text, sep in ids for x in (*text, sep)],
                    "speakers": [people.index(s) for s in speakers],
                    "response": letters(cut[i + 1]),
                    "profile_words": [w for items in plain for w in words(items)],
                    "profile_word_counts": [len(items) for items in plain],
                    "profile_characters": [c for items in spelled for c in items],
                    "profile_character_counts": [len(items) for items in spelled],
                    "target_words": words(keyed),
                    "target_characters": [c for item in keyed for c in letters(item)],
                    "rule": rule_of(cut[i], cut[i + 1], persona[0]),
                }
            )
    return rows, left_out


WORD = st.text(alphabet="的我𠮷a厦龘", min_size=1, max_size=4)
PROFILES = st.builds(
    lambda gender, place, tags: Profile("\t".join([gender, place, *dict.fromkeys(tags)]), ""),
    st.sampled_from(["男", "女", ""]),
    st.sampled_from(["", "福建厦门", "未知"]),
    st.lists(WORD | st.just("我的"), max_size=3),
)
TEXT = st.lists(
    st.sampled_from([*"的我𠮷a龘?", "是", "男生", "福建", "厦门", "是男是女", "我在福", "女朋友"]), max_size=8
).map("".join)


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    profiles = draw(st.lists(PROFILES, min_size=1, max_size=4))
    utterances = draw(st.lists(TEXT, min_size=1, max_size=12))
    speakers = [draw(st.integers(0, len(profiles) - 1)) for _ in utterances]
    key = draw(st.binary(min_size=16, max_size=16))
    has_reference = len(utterances) > 1 and draw(st.booleans())
    return Session("\n".join(utterances), speakers, profiles, False, has_reference, key, key)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(sessions(), max_size=5),
    st.integers(1, 6),
    st.integers(1, 8),
    st.sampled_from(["drop", "keep"]),
)
def test_examples_are_those_of_the_oracle(batch: list[Session], utterance: int, context: int, personas: str) -> None:
    got = encode(
        batch,
        max_utterance_characters=utterance,
        max_context_utterances=context,
        incomplete_personas=personas,
    )
    expected, left_out = oracle(batch, utterance, context, personas == "drop")
    assert +Counter({reason: len(rows) for reason, rows in got.left_out.items()}) == left_out
    assert got.session.tolist() == [row["session"] for row in expected]
    for name in LIST_COLUMNS:
        assert got.table[name].to_pylist() == [row[name] for row in expected], name
    assert got.rule.tolist() == [row["rule"] for row in expected]
    assert got.table["persona_related"].to_pylist() == [row["rule"] > 0 for row in expected]
    counts = Counter((got.session.tolist()[i] % 2, rule) for i, rule in enumerate(got.rule.tolist()) if rule)
    found = got.persona_related_of(np.arange(len(batch), dtype=np.int8) % 2)
    assert {(split, 1 + list(RULES).index(rule)): n for split, c in found.items() for rule, n in (+c).items()} == counts
    assert all(i >= 0 for i in got.table["example_id"].to_pylist())


def session_of(utterances: list[str], speakers: list[int], *profiles: tuple[str, ...]) -> Session:
    people = [Profile("\t".join(words), "") for words in profiles]
    return Session("\n".join(utterances), speakers, people, False, False, bytes(16), bytes(range(16)))


def test_an_example_by_hand() -> None:
    got = encode([session_of(["我a", "的的", "的"], [1, 0, 1], ("男", "福建厦门"), ("女", "福建厦门", "我的", "啊"))])
    unk, sep, word_unk = CHARACTERS.special.unk, CHARACTERS.special.sep, WORDS.special.unk
    (row,) = got.table.to_pylist()
    assert row["context"] == [*CHARACTERS.encode("我a"), sep]
    assert row["speakers"] == [1]
    assert row["response"] == list(CHARACTERS.encode("的的"))
    assert row["profile_words"] == [3, 5, word_unk, 4, 5, 6, word_unk]
    assert row["profile_word_counts"] == [3, 4]
    assert row["profile_characters"] == [
        *CHARACTERS.encode("男福建厦门"),
        unk,
        *CHARACTERS.encode("女福建厦门我的"),
        unk,
    ]
    assert row["profile_character_counts"] == [6, 8]
    assert row["target_words"] == [0, 3, 1, 5, 2, word_unk]
    assert row["target_characters"] == [*CHARACTERS.encode("性别男地址福建厦门兴趣"), unk]


def test_a_context_has_at_most_seven_cut_utterances() -> None:
    got = encode([session_of(["我" * 40] * 12, [0, 1] * 6, ("男", "福建厦门"), ("女", "福建厦门"))])
    assert [len(context) for context in got.table["context"].to_pylist()] == [16, 48, 80, 112, 112, 112]
    assert {len(response) for response in got.table["response"].to_pylist()} == {15}


def test_example_ids_depend_on_the_session_and_the_response_alone() -> None:
    one = session_of(["我", "a", "的", "a"], [0, 1, 0, 1], ("男", "福建厦门"), ("女", "福建厦门"))
    other = one._replace(record_hash=bytes(range(1, 17)))
    alone, both = encode([one]).table, encode([other, one]).table
    assert both["example_id"].to_pylist()[2:] == alone["example_id"].to_pylist()
    assert len(set(both["example_id"].to_pylist())) == 4


def test_no_session_is_no_example() -> None:
    assert encode([]).table.num_rows == 0
    assert encode([session_of(["我"], [0], ("男", "福建厦门"))]).table.num_rows == 0


@pytest.mark.parametrize(
    ("starts", "lengths", "expected"),
    [([], [], []), ([5, 0, 7], [2, 0, 3], [5, 6, 7, 8, 9]), ([3], [0], [])],
)
def test_ranges(starts: list[int], lengths: list[int], expected: list[int]) -> None:
    assert ranges(np.array(starts, np.int64), np.array(lengths, np.int64)).tolist() == expected
