"""What the parser takes of a raw record, and why it rejects one."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arplus.data.records import REJECT_REASONS, Reject, Session, parse_line

RAW: dict[str, Any] = {
    "dialog": [["那么 晚"], ["加班 了  刚 到\u00a0家\u3000呀 ！\ufe0f"]],
    "profile": [
        {"tag": ["a b;c;c;"], "loc": "福建 厦门", "gender": "male"},
        {"tag": [""], "loc": "", "gender": ""},
    ],
    "uid": [0, 1],
}


def parse(record: Any) -> Session | Reject:
    return parse_line(json.dumps(record, ensure_ascii=False).encode())


def session(record: Any) -> Session:
    result = parse(record)
    assert isinstance(result, Session), result
    return result


def changed(**fields: Any) -> dict[str, Any]:
    return {k: v for k, v in {**RAW, **fields}.items() if v != "absent"}


def test_the_raw_form() -> None:
    result = session(RAW)
    assert result.utterances == ["那么晚", "加班了刚到家呀！"]
    assert result.speakers == [0, 1]
    assert [p.words for p in result.profiles] == [("男", "福建厦门", "ab", "c"), ("", "")]
    assert not result.uid_missing


@pytest.mark.parametrize(
    "same",
    [
        changed(dialog=["那么 晚", "加班 了 刚 到 家 呀 ！\ufe0f"]),
        changed(profile=[{**RAW["profile"][0], "tag": "ab;c"}, {"tag": [], "loc": None}]),
        changed(profile=[{**RAW["profile"][0], "tag": ["c", "ab"]}, {"gender": None, "loc": "", "tag": None}]),
        changed(profile={"tag": [["ab;c"], []], "loc": ["福建厦门", ""], "gender": ["male", ""]}),
        changed(uid="absent"),
        changed(is_biased=True, responses=3),
    ],
    ids=["flat", "tag as str", "tags as list", "profiles as columns", "no uid", "other fields"],
)
def test_every_form_is_the_same_session(same: Any) -> None:
    result, expected = session(same), session(RAW)
    assert result.utterances == expected.utterances
    assert result.speakers == expected.speakers
    assert result.record_hash == expected.record_hash
    assert result.uid_missing == ("uid" not in same)


@pytest.mark.parametrize("name", ["responder_profile", "response_profile"])
@pytest.mark.parametrize("golden", ["好 的", ["好 的"]])
def test_a_golden_response_is_the_last_utterance_by_a_profile_of_its_own(name: str, golden: Any) -> None:
    result = session(
        {
            "dialog": ["在 吗"],
            "profile": RAW["profile"],
            "uid": [1],
            "golden_response": golden,
            name: {"tag": "x", "loc": "其他", "gender": "female"},
            "is_biased": False,
        }
    )
    assert result.utterances == ["在吗", "好的"]
    assert result.speakers == [1, 2]
    assert result.profiles[2].words == ("女", "其他", "x")


def test_a_reference_after_any_number_of_utterances_is_marked() -> None:
    golden = {"golden_response": "好", "responder_profile": RAW["profile"][0]}
    assert session({**RAW, **golden}).has_reference
    assert not session(RAW).has_reference


def test_a_null_is_an_absent_field() -> None:
    assert session({**RAW, "golden_response": None}) == session(RAW)
    golden = {"golden_response": "好", "responder_profile": None, "response_profile": RAW["profile"][0]}
    assert session({**RAW, **golden}).has_reference


def test_any_number_of_speakers() -> None:
    profiles = [{"tag": [""], "loc": "", "gender": ""}] * 300
    result = session({"dialog": ["a"] * 300, "profile": profiles, "uid": list(range(300))})
    assert result.speakers == list(range(300))


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "not_an_object"),
        (changed(dialog="absent"), "dialog"),
        (changed(dialog="text"), "dialog"),
        (changed(dialog=[], uid=[]), "empty_dialogue"),
        (changed(dialog=[["a"], 3]), "utterance"),
        (changed(dialog=[["a"], ["b", "c"]]), "utterance"),
        (changed(dialog=[["a"], []]), "utterance"),
        (changed(profile="absent"), "profile"),
        (changed(profile=[1, 2]), "profile"),
        (changed(profile={"tag": [[]], "loc": []}), "profile"),
        (changed(profile=[{**RAW["profile"][0], "gender": "other"}] * 2), "gender"),
        (changed(profile=[{**RAW["profile"][0], "gender": 0}] * 2), "gender"),
        (changed(profile=[{**RAW["profile"][0], "loc": ["x"]}] * 2), "loc"),
        (changed(profile=[{**RAW["profile"][0], "tag": [1]}] * 2), "tag"),
        (changed(profile=[{**RAW["profile"][0], "tag": 0}] * 2), "tag"),
        (changed(uid=[0, "1"]), "uid"),
        (changed(uid=[0, True]), "uid"),
        (changed(uid=[0, 1.0]), "uid"),
        (changed(uid=3), "uid"),
        (changed(uid=[0]), "uid_length"),
        (changed(uid=[0, 2]), "uid_out_of_range"),
        (changed(uid=[0, -1]), "uid_out_of_range"),
        (changed(uid="absent", profile=RAW["profile"][:1]), "uid_out_of_range"),
        (changed(golden_response="x"), "golden_response"),
        (changed(golden_response=3, responder_profile=RAW["profile"][0]), "golden_response"),
    ],
)
def test_a_wrong_record_is_rejected_with_its_reason(record: Any, reason: str) -> None:
    assert parse(record) == Reject(reason)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"", "invalid_json"),
        (json.dumps(RAW).encode()[:-7], "invalid_json"),
        (json.dumps(RAW).replace("\\u90a3", "\\ud800").encode(), "lone_surrogate"),
        (json.dumps(RAW, ensure_ascii=False).encode().replace("晚".encode(), b"\0"), "invalid_json"),
        (json.dumps(RAW, ensure_ascii=False).encode().replace("晚".encode(), b"\xff"), "invalid_utf8"),
        (json.dumps(RAW, ensure_ascii=False).encode()[:16], "invalid_utf8"),
        (b"[" * 100_000, "invalid_json"),
        (b'{"dialog": NaN}', "json_constant"),
        (json.dumps({**RAW, "score": float("nan")}).encode(), "json_constant"),
        (json.dumps({**RAW, "score": float("inf")}).encode(), "json_constant"),
        (json.dumps({**RAW, "score": -float("inf")}).encode(), "json_constant"),
        (json.dumps({**RAW, "score": float("nan")}).encode()[:-1], "invalid_json"),
        (json.dumps({**RAW, "score": 10**400}).encode(), "number_too_large"),
        (json.dumps(RAW).replace("[0, 1]", '[0, 1], "x": 1e999').encode(), "number_too_large"),
        (json.dumps({**RAW, "\udc00": 1}).encode(), "lone_surrogate"),
        (b"[" * 1500 + b"]" * 1500, "invalid_json"),
        (b"null", "not_an_object"),
    ],
)
def test_a_broken_line_is_rejected_with_its_reason(line: bytes, reason: str) -> None:
    assert parse_line(line) == Reject(reason)


def test_a_large_number_in_an_unused_field_does_not_matter() -> None:
    assert session({**RAW, "id": 10**30}) == session(RAW)


def test_a_profile_is_bounded_and_what_is_cut_off_is_counted() -> None:
    tags = [f"t{i}" for i in range(20_000)]
    profile = {"tag": [";".join(tags)], "loc": "省" * 51, "gender": "male"}
    for many in (profile, {**profile, "tag": tags}):
        first, second = session(changed(profile=[many, RAW["profile"][0]])).profiles
        assert first.words == ("男", "省" * 50, *tags[:100])
        assert (first.tags_left_out, first.words_cut) == (19_900, 1)
        assert (second.tags_left_out, second.words_cut) == (0, 0)
    long = {"tag": ["长" * 1000 + ";短;" + "长" * 2000 + ";" + "x" * 50], "loc": "", "gender": ""}
    first = session(changed(profile=[long, RAW["profile"][0]])).profiles[0]
    assert first.words == ("", "", "长" * 50, "短", "x" * 50)
    assert (first.tags_left_out, first.words_cut) == (0, 2)


def test_rare_but_valid_text_is_kept() -> None:
    result = session(changed(dialog=["a\0b", "𠮷\nhttp://x.y " + "长" * 100_000]))
    assert result.utterances == ["a\0b", "𠮷http://x.y" + "长" * 100_000]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PROFILE = st.fixed_dictionaries(
    {},
    optional={
        "gender": st.sampled_from(["male", "female", ""]) | JSON,
        "loc": st.text(max_size=5) | JSON,
        "tag": st.lists(st.text(max_size=5), max_size=2) | JSON,
    },
)
RECORD = st.fixed_dictionaries(
    {},
    optional={
        "dialog": st.lists(st.text(max_size=5) | st.lists(st.text(max_size=5), max_size=2) | JSON, max_size=4) | JSON,
        "profile": st.lists(PROFILE | JSON, max_size=3) | JSON,
        "uid": st.lists(st.integers(-1, 3), max_size=4) | JSON,
        "golden_response": JSON,
        "responder_profile": PROFILE | JSON,
    },
)


def check_result(result: Session | Reject) -> None:
    if isinstance(result, Reject):
        assert result.reason in REJECT_REASONS
        return
    assert len(result.utterances) == len(result.speakers) > 0
    assert all(0 <= s < len(result.profiles) for s in result.speakers)
    for text in [*result.utterances, *(word for p in result.profiles for word in p.words)]:
        assert not any(c.isspace() or c == "\ufe0f" for c in text)
    for profile in result.profiles:
        assert profile.words[0] in ("男", "女", "")
        assert all(profile.words[2:])
        assert len(set(profile.words[2:])) == len(profile.words[2:])


@given(RECORD)
def test_whatever_the_record_there_is_a_session_or_a_reason(record: Any) -> None:
    check_result(parse_line(json.dumps(record).encode()))


@given(st.binary(max_size=50))
def test_whatever_the_bytes_there_is_a_session_or_a_reason(line: bytes) -> None:
    check_result(parse_line(line))


TEXT = st.text(alphabet="的我𠮷a ,", max_size=6)
SPACE = st.text(alphabet=" \t\n\u00a0\u3000\u2009", max_size=3)


@given(st.lists(st.lists(st.tuples(TEXT, SPACE), min_size=1, max_size=3), min_size=1, max_size=4))
def test_white_space_does_not_change_the_hashes(pieces: list[list[tuple[str, str]]]) -> None:
    plain = ["".join(text for text, _ in utterance) for utterance in pieces]
    spaced = ["".join(text + space for text, space in utterance) for utterance in pieces]
    first = session(changed(dialog=plain, uid=[0] * len(plain)))
    second = session(changed(dialog=[[u] for u in spaced], uid=[0] * len(plain)))
    assert first == second


@pytest.mark.parametrize(
    ("other", "same_dialogue"),
    [
        (changed(dialog=["那么晚加班", "了刚到家呀！\ufe0f"]), False),
        (changed(dialog=["那么晚", "加班了刚到家呀！"]), False),
        (changed(uid=[1, 0]), True),
        (changed(profile=RAW["profile"][::-1]), True),
        (changed(profile=[{**RAW["profile"][0], "tag": ["ab"]}, RAW["profile"][1]]), True),
        (changed(profile=[{**RAW["profile"][0], "gender": "female"}, RAW["profile"][1]]), True),
        (changed(profile=[*RAW["profile"], RAW["profile"][1]]), True),
    ],
    ids=["cut elsewhere", "U+FE0F", "who speaks", "order of profiles", "tags", "gender", "one profile more"],
)
def test_what_differs_has_another_hash(other: Any, same_dialogue: bool) -> None:
    first, second = session(RAW), session(other)
    assert first.record_hash != second.record_hash
    assert (first.dialogue_hash == second.dialogue_hash) == same_dialogue
