"""Replies of two checkpoints that people rate without knowing whose they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from arplus import cli, storage
from arplus.config import EvaluateConfig
from arplus.errors import ResourceError, UsageError
from arplus.evaluation import sheets


def row(i: int, reply: str) -> dict[str, Any]:
    shown = {"context": f"问{i} / 答", "persona": "性别 男", "reference": "好"}
    return {"split": "test", "example": i, **shown, "reply": reply, "loss": 0.5 + i}


MINE = [row(i, f"我{i}" if i else "同") for i in range(60)]
OTHERS = [row(i, f"他{i}" if i else "同") for i in reversed(range(60))]


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_sheet_is_blind_and_its_key_opens_it(tmp_path: Path) -> None:
    config = EvaluateConfig(checkpoint="runs/mine", against="runs/other", replies=str(tmp_path / "r.v2.jsonl"), seed=7)
    sheets.write(config, MINE, OTHERS)
    rows, sheet, key = (read(tmp_path / name) for name in ("r.v2.jsonl", "r.v2.sheet.jsonl", "r.v2.key.jsonl"))
    assert [(r["reply"], r["against_reply"], r["seed"]) for r in rows[:2]] == [("同", "同", 7), ("我1", "他1", 7)]
    assert [r["against_loss"] for r in rows] == [r["loss"] for r in rows]
    assert len(sheet) == len(key) == 59, "two replies that are the same are not rated"
    assert "runs" not in (tmp_path / "r.v2.sheet.jsonl").read_text()
    assert all(set(pair) == {"pair", "context", "persona", "a", "b", "better"} for pair in sheet)
    assert [k["example"] for k in key] != sorted(k["example"] for k in key)
    for pair, opened in zip(sheet, key, strict=True):
        i = opened["example"]
        assert pair["pair"] == opened["pair"]
        assert pair["context"] == f"问{i} / 答"
        assert {opened["a"]: pair["a"], opened["b"]: pair["b"]} == {"runs/mine": f"我{i}", "runs/other": f"他{i}"}
    assert 15 < sum(opened["a"] == "runs/mine" for opened in key) < 45, "which one comes first is by chance"
    sheets.write(config, MINE[::-1], OTHERS)
    assert read(tmp_path / "r.v2.sheet.jsonl") == sheet, "--seed makes the order, not who was first"


def test_a_table_for_spreadsheets(tmp_path: Path) -> None:
    file = tmp_path / "replies.csv"
    sheets.write(EvaluateConfig(replies=str(file)), [row(1, '他说,"好"')])
    head, line = file.read_text().splitlines()
    assert head == "\ufeffsplit,example,context,persona,reference,reply,loss,seed"
    assert line == 'test,1,问1 / 答,性别 男,好,"他说,""好""",1.5,0'
    assert [f.name for f in tmp_path.iterdir()] == ["replies.csv"]


def test_replies_of_hours_wait_for_storage_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[Exception | None] = [ResourceError("away"), None]
    written = {}

    def write_bytes(uri: str, data: bytes) -> None:
        if answer := answers.pop(0):
            raise answer
        written[uri] = data

    monkeypatch.setattr(storage, "write_bytes", write_bytes)
    sheets.write(EvaluateConfig(replies="s3://bucket/replies.jsonl"), [row(1, "好")])
    assert list(written) == ["s3://bucket/replies.jsonl"]


def test_the_names_end_says_the_form() -> None:
    with pytest.raises(UsageError, match=r"--replies: must end with \.csv or \.jsonl"):
        cli.parse(EvaluateConfig(), ["--checkpoint", "c", "--data", "d", "--replies", "replies.xlsx"], prog="x")
