"""Sessions as arrays hold what was put in."""

import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arplus.data.hashes import hash_words
from arplus.data.sessions import LINE_BITS, RejectedLine, code_points, parse_block

GOOD = {"dialog": ["a", "b"], "profile": [{"tag": "", "loc": "", "gender": ""}] * 2, "uid": [0, 1]}


def test_every_line_of_a_block_is_a_session_a_reject_or_blank() -> None:
    lines = [json.dumps(GOOD).encode(), b"", b"{", json.dumps({**GOOD, "uid": None}).encode(), b" \t", b"[]"]
    block = parse_block(b"\n".join(lines), file=3, first_line=100, duplicate_key="dialogue")
    expected = {"records": 4, "sessions": 2, "blank_lines": 2, "uid_missing": 1, "tags_left_out": 0, "words_cut": 0}
    assert block.counts == expected
    assert block.sessions["id"].to_pylist() == [3 << LINE_BITS | 100, 3 << LINE_BITS | 103]
    assert block.rejects == [RejectedLine(102, "invalid_json", b"{"), RejectedLine(105, "not_an_object", b"[]")]


def test_white_space_around_a_record_makes_it_another_line() -> None:
    line = json.dumps(GOOD).encode()
    block = parse_block(b"\n".join([line, line, line + b" "]), file=0, first_line=0, duplicate_key="exact_record")
    first, second, third = hash_words(block.hashes["exact_record"]).tolist()
    assert first == second != third
    assert hash_words(block.sessions["key"]).tolist() == [first, second, third]


def test_the_last_line_may_have_no_end() -> None:
    line = json.dumps(GOOD).encode()
    for lines in (line, line + b"\n"):
        assert parse_block(lines, file=0, first_line=0, duplicate_key="dialogue").counts["records"] == 1
    assert parse_block(b"", file=0, first_line=0, duplicate_key="dialogue").counts["records"] == 0


@given(st.lists(st.text()), st.integers(0, 3))
def test_code_points_of_any_strings(texts: list[str], skipped: int) -> None:
    points, offsets = code_points(pa.array(texts, pa.string())[skipped:])
    texts = texts[skipped:]
    assert [chr(p) for p in points] == list("".join(texts))
    assert offsets.tolist() == np.cumsum([0, *map(len, texts)]).tolist()


def test_hashes_of_a_sliced_column() -> None:
    values = [bytes([i] * 16) for i in range(5)]
    column = pa.chunked_array([pa.array(values, pa.binary(16))[1:3], pa.array(values, pa.binary(16))[4:]])
    assert hash_words(column).tobytes() == values[1] + values[2] + values[4]


def test_a_line_that_is_too_long_is_a_reject_wherever_it_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("arplus.data.sessions.MAX_LINE_BYTES", 200)
    line = json.dumps({**GOOD, "dialog": ["a" * 150, "b"]}).encode()
    short = json.dumps(GOOD).encode()
    block = parse_block(b"\n".join([short, line, short]), file=0, first_line=5, duplicate_key="dialogue")
    assert block.rejects == [RejectedLine(6, "line_too_long", line)]
    assert block.counts["records"] == 3
    block = parse_block(line[:100], file=0, first_line=5, duplicate_key="dialogue", left_out=len(line) - 100)
    assert block.rejects == [RejectedLine(5, "line_too_long", line[:100], len(line) - 100)]
    assert block.counts["records"] == 1
