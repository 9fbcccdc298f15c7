"""Vocabularies and their files."""

import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arplus.config import SPECIAL_TOKENS
from arplus.errors import UsageError
from arplus.text import ALWAYS_PERSONA_WORDS, Vocabulary, clean, sizes

CHARACTERS = Vocabulary(["的", "我", "𠮷", "a"], [9, 7, 5, 1])


def test_special_tokens_take_the_last_nine_ids() -> None:
    assert CHARACTERS.size == 13
    assert CHARACTERS.special == tuple(range(4, 13))
    assert [CHARACTERS.token(i) for i in range(13)] == [*CHARACTERS.tokens, *SPECIAL_TOKENS]


def test_both_ways_of_encoding_agree_and_strangers_are_unk() -> None:
    text = "我a吃𠮷的\U0010ffff"
    points = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    assert CHARACTERS.encode(text).tolist() == [1, 3, CHARACTERS.special.unk, 2, 0, CHARACTERS.special.unk]
    assert CHARACTERS.by_code_point[points].tolist() == CHARACTERS.encode(text).tolist()


@given(st.text(alphabet="的我𠮷a"))
def test_decoding_gives_the_text_back_and_stops_at_a_special_token(text: str) -> None:
    ids = CHARACTERS.encode(text).tolist()
    assert CHARACTERS.decode(ids) == text
    for special in CHARACTERS.special:
        assert CHARACTERS.decode([*ids, special, 0]) == text


@given(st.text())
def test_clean_text_has_no_white_space_and_loses_nothing_else(text: str) -> None:
    cleaned = clean(text)
    assert not any(c.isspace() or c == "\ufe0f" for c in cleaned)
    assert cleaned == "".join(c for c in text if not c.isspace() and c != "\ufe0f")


def test_counted_vocabulary_does_not_depend_on_the_order_of_counting() -> None:
    counts = {"美食": 5, "旅游": 5, "音乐": 9, "罕": 1, "女": 7}
    made = [
        Vocabulary.from_counts(
            dict(random.sample(list(counts.items()), 5)), minimum=2, maximum=8, always=("性别", "女")
        )
        for _ in range(10)
    ]
    assert made[0].tokens == ["音乐", "女", "旅游", "美食", "性别"]
    assert all(vocabulary == made[0] for vocabulary in made)
    for order in (("美食", "旅游"), ("旅游", "美食")):  # the last place goes to the lower code point
        assert Vocabulary.from_counts(dict.fromkeys(order, 3), minimum=1, maximum=1).tokens == ["旅游"]


def test_counted_vocabulary_keeps_within_its_size_and_always_has_the_keys() -> None:
    counts = {chr(0x4E00 + i): 1000 - i for i in range(100)}
    vocabulary = Vocabulary.from_counts(counts, minimum=1, maximum=20, always=ALWAYS_PERSONA_WORDS)
    assert len(vocabulary.tokens) == 20
    assert set(ALWAYS_PERSONA_WORDS) <= set(vocabulary.tokens)
    assert set(list(counts)[:15]) <= set(vocabulary.tokens)


def test_words_spelled_like_special_tokens_are_strangers() -> None:
    vocabulary = Vocabulary.from_counts({"美食": 5, "[UNK]": 9, "[PAD]": 7}, minimum=1, maximum=9)
    assert Vocabulary.from_bytes(vocabulary.to_bytes(), source="") == vocabulary
    unk = vocabulary.special.unk
    assert vocabulary.encode(["美食", "[UNK]", "[PAD]"]).tolist() == [0, unk, unk]


@pytest.mark.parametrize(
    ("content", "tokens", "counts"),
    [
        ("的\t12\n我\t3\n", ["的", "我"], [12, 3]),
        ("的 12\n， 3\n", ["的", "，"], [12, 3]),
        ("四川 成都\t6816\n性别\t-1\n", ["四川 成都", "性别"], [6816, -1]),
        ("的\n我", ["的", "我"], [0, 0]),
        ("2 7\r\n90后\t5\r\n", ["2", "90后"], [7, 5]),
        ("\ufeff的 12\n我 3\n", ["的", "我"], [12, 3]),
        ("\ufeff\t12\n我\t3\n", ["\ufeff", "我"], [12, 3]),
    ],
)
def test_reads_every_form_of_vocabulary_file(
    tmp_path: Path, content: str, tokens: list[str], counts: list[int]
) -> None:
    file = tmp_path / "vocabulary.txt"
    file.write_bytes(content.encode())
    vocabulary = Vocabulary.load(str(file))
    assert (vocabulary.tokens, vocabulary.counts) == (tokens, counts)
    file.write_bytes(vocabulary.to_bytes())
    assert Vocabulary.load(str(file)) == vocabulary


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("的 1\n的 2\n", "'的' is there twice"),
        ("", "empty vocabulary"),
        ("[PAD] 3\n", "leave the nine special tokens out"),
    ],
)
def test_refuses_a_broken_vocabulary_by_name(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "vocabulary.txt"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as caught:
        Vocabulary.load(str(file))
    assert str(file) in str(caught.value)


def test_sizes_are_the_paper_s_for_the_paper_s_numbers_of_tokens() -> None:
    found = sizes(
        Vocabulary([chr(i) for i in range(0x4E00, 0x4E00 + 9489)]), Vocabulary([str(i) for i in range(10002)])
    )
    assert (found.characters, found.persona_words) == (9498, 10011)
