"""Further sets beside the input: the official test files, kept out of training."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from arplus.config import PrepareConfig, from_dict
from arplus.data.dataset import Dataset
from arplus.data.sessions import LINE_BITS
from arplus.errors import UsageError
from arplus.prepare import tasks
from arplus.prepare.duplicates import SPLITS, membership
from arplus.prepare.pipeline import prepare

PROFILE = {"tag": ["美食;旅游"], "loc": "四川 成都", "gender": "female"}
WORDS = "甲乙丙丁戊己庚辛壬癸"


def text(i: int) -> str:
    return " ".join(WORDS[int(digit)] for digit in f"{i:05d}")


def session(first: int, turns: int, **changes: Any) -> dict[str, Any]:
    dialog = [[text(first + t)] for t in range(turns)]
    return {"dialog": dialog, "profile": [PROFILE, PROFILE], "uid": [t % 2 for t in range(turns)], **changes}


def official(first: int, turns: int, golden: int) -> dict[str, Any]:
    """A record of an official test file: the context, and the reference reply apart."""
    record = session(first, turns)
    record["dialog"] = [utterance[0] for utterance in record["dialog"]]
    return {**record, "golden_response": [text(golden)], "responder_profile": PROFILE, "is_biased": False}


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def settings(tmp_path: Path, name: str, records: list[dict[str, Any]], **more: Any) -> PrepareConfig:
    source = write(tmp_path / f"{name}.jsonl", records)
    counts = {"min_character_count": 1, "min_persona_word_count": 1}
    return PrepareConfig(input=source, output=str(tmp_path / name), valid=0.05, test=0.05, **counts, **more)


def rows(output: str, split: str) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    files = dict.fromkeys(group.file for group in Dataset.open(output).split(split).row_groups)
    return [row for file in files for row in pq.read_table(file).to_pylist()]


@pytest.mark.usefixtures("ray_cluster")
def test_one_task_gets_the_hashes_of_evaluation_sets_and_not_of_all_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A task's arguments lie on one node together, and those of all the input may find no room there."""
    given, hashes = [], tasks.evaluation_hashes.remote
    spy = SimpleNamespace(remote=lambda firsts, *blocks: (given.append(len(blocks)), hashes(firsts, *blocks))[1])
    monkeypatch.setattr(tasks, "evaluation_hashes", spy)
    more = write(tmp_path / "more.jsonl", [official(50_000, 1, 50_001)])
    ours = [session(10 * i, 2) for i in range(1000)] + [session(50_000, 2)]
    config = settings(tmp_path, "ours", ours, evaluation_set=(f"more={more}",))
    manifest = prepare(config, block_bytes=20_000)
    assert manifest.overlaps == {"more": 1}
    assert given == [1], "of more than ten blocks"


@pytest.mark.usefixtures("ray_cluster")
def test_evaluation_sets_are_splits_whose_dialogues_are_nowhere_else(tmp_path: Path) -> None:
    ours = [session(10 * i, 2) for i in range(1000)]
    other_people = {"profile": [{**PROFILE, "gender": "male"}] * 2}
    ours += [session(50_000, 2), session(60_000, 4), session(60_000, 4, **other_people), session(60_000, 4)]
    random_set = [official(50_000, 1, 50_001), official(50_100, 2, 50_102), official(50_200, 3, 50_203)]
    random_set += [random_set[1], {"no": "record"}]
    biased_set = [official(60_000, 3, 60_003), official(50_000, 1, 50_001)]
    sets = (f"random={write(tmp_path / 'r.jsonl', random_set)}", f"biased={write(tmp_path / 'b.jsonl', biased_set)}")
    config = settings(tmp_path, "with", ours, evaluation_set=sets, max_reject_share=0.3)
    manifest = prepare(config)

    assert manifest.records == 1004
    assert manifest.duplicates == {"exact_record": 1, "dialogue_and_profiles": 1, "dialogue": 2}
    assert manifest.sessions == 1003
    assert manifest.overlaps == {"random": 1, "biased": 2}, "the first set that has the dialogue counts it"
    assert sum(manifest.splits[split].sessions for split in SPLITS) == 1000
    assert {name: manifest.splits[name].sessions for name in ("random", "biased")} == {"random": 4, "biased": 2}
    assert manifest.evaluation_sets["random"].records == 5
    assert manifest.evaluation_sets["random"].rejected == {"dialog": 1}
    assert manifest.rejected == {}

    dataset = Dataset.open(config.output)
    decoded = {
        split: sorted(
            (dataset.characters.decode(row["response"]), len(row["speakers"])) for row in rows(config.output, split)
        )
        for split in manifest.splits
    }
    replies = sorted((text(i).replace(" ", ""), n) for i, n in ((50_001, 1), (50_102, 2), (50_102, 2), (50_203, 3)))
    assert decoded["random"] == replies, "one example a record, whose response is the reference reply"
    assert decoded["biased"] == sorted((text(i).replace(" ", ""), n) for i, n in ((50_001, 1), (60_003, 3)))
    seen = {reply for split in SPLITS for reply, _ in decoded[split]}
    assert len(seen) == 1000
    assert not seen & {reply for name in ("random", "biased") for reply, _ in decoded[name]}

    # The vocabularies and the splits are those of the data without what was kept out.
    alone = prepare(settings(tmp_path, "alone", ours[:1000]))
    for split in SPLITS:
        assert [f.digest for f in alone.splits[split].files] == [f.digest for f in manifest.splits[split].files]
    assert alone.fingerprint != manifest.fingerprint
    assert alone.overlaps == {}


@pytest.mark.usefixtures("ray_cluster")
def test_the_first_set_that_has_a_dialogue_does_not_depend_on_which_block_comes_first() -> None:
    hashes = [np.arange(32, dtype=np.uint8).tobytes(), bytes(32), bytes(16)]
    blocks = [
        pa.table(
            {"ids": [(np.arange(len(h) // 16) | (file << LINE_BITS)).tobytes()], "dialogue": [h]},
            schema=pa.schema([("ids", pa.large_binary()), ("dialogue", pa.large_binary())]),
        )
        for file, h in enumerate(hashes)
    ]
    for order in ([0, 1, 2], [2, 1, 0], [1, 0, 2]):
        rows = ray.get(tasks.evaluation_hashes.remote([1, 2], *(blocks[i] for i in order)))
        assert rows[:, 2].tolist() == [0, 0, 1], "the input's own block is not in it"
        assert not rows[:, :2].any()


@pytest.mark.usefixtures("ray_cluster")
def test_an_evaluation_set_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    ours = [session(10 * i, 2) for i in range(20)]
    with pytest.raises(UsageError, match="no such file"):
        prepare(settings(tmp_path, "a", ours, evaluation_set=(f"random={tmp_path}/absent.jsonl",)))
    broken = write(tmp_path / "broken.jsonl", [{"no": "record"}])
    with pytest.raises(UsageError, match=r"broken.jsonl: every line is rejected \(1 of 1: dialog,"):
        prepare(settings(tmp_path, "b", ours, evaluation_set=(f"random={broken}",)))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["random"], "must be NAME=URI"),
        (["random="], "must be NAME=URI"),
        (["=x"], "needs a name"),
        (["train=x"], "needs a name of letters, digits, - and _, none of train, valid"),
        (["a/b=x"], "needs a name"),
        (["a=x", "a=y"], "names 'a' twice"),
    ],
)
def test_a_wrong_evaluation_set_is_refused(given: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=f"--evaluation-set: {problem}"):
        from_dict(PrepareConfig, {"input": "a", "output": "b", "evaluation_set": given}, source="test")


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3))), st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)))
)
def test_membership(hashes: list[tuple[int, int]], known: list[tuple[int, int]]) -> None:
    found = membership(np.array(hashes, np.uint64).reshape(-1, 2), np.array(known, np.uint64).reshape(-1, 2))
    assert found.tolist() == [known.index(pair) if pair in known else -1 for pair in hashes]
