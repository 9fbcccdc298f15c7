"""The whole preparation on a real Ray cluster of two CPUs."""

import gzip
import hashlib
import json
import random
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import zstandard

from arplus.config import ExampleRules, PrepareConfig, VocabularySizes
from arplus.data.dataset import Dataset
from arplus.data.manifest import Manifest
from arplus.errors import UsageError
from arplus.prepare.card import report
from arplus.prepare.duplicates import SPLITS
from arplus.prepare.pipeline import prepare

pytestmark = pytest.mark.usefixtures("ray_cluster")

CHARACTERS = (
    "的一是了我不人在他有这个上们来到时大地为子中你说生国年着就那和要她出也得里后自以会家可下而过天去能对小多然于心"
)


def records(n: int, seed: int = 0) -> list[dict[str, Any]]:
    """Distinct sessions of two to nine utterances."""
    r = random.Random(seed)

    def text() -> str:
        asks = "是 男 是 女 " if r.random() < 0.05 else ""
        return asks + " ".join(r.choice(CHARACTERS) for _ in range(r.randrange(4, 25)))

    def profile() -> dict[str, Any]:
        place = r.choice(["四川 成都", "其他", "海外 美国", "北京", ""])
        return {
            "tag": [";".join(r.sample(["美食", "旅游", "音乐", "宅"], r.randrange(4)))],
            "loc": place,
            "gender": r.choice(["male", "female"]),
        }

    lengths = [r.choice([1, 2, 2, 2, 3, 4, 9]) for _ in range(n)]
    return [
        {"dialog": [[text()] for _ in range(k)], "profile": [profile(), profile()], "uid": [i % 2 for i in range(k)]}
        for k in lengths
    ]


def lines(items: list[dict[str, Any]]) -> list[bytes]:
    return [json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in items]


def run(tmp_path: Path, content: dict[str, bytes], *, name: str = "", block_bytes: int = 16 << 20, **settings: Any):
    """Writes the files, prepares them, returns output folder and manifest."""
    key = name or hashlib.sha256(repr((sorted(content), settings, block_bytes)).encode()).hexdigest()[:8]
    source = tmp_path / f"{key}-in"
    source.mkdir(exist_ok=True)
    for file, data in content.items():
        (source / file).write_bytes(data)
    output = tmp_path / f"{key}-out"
    defaults = {"min_character_count": 2, "min_persona_word_count": 1}
    config = PrepareConfig(input=str(source), output=str(output), **{**defaults, **settings})
    return output, prepare(config, block_bytes=block_bytes)


def rows(output: Path, split: str) -> list[dict[str, Any]]:
    dataset = Dataset.open(str(output)).split(split)
    tables = [pq.read_table(file) for file in dict.fromkeys(group.file for group in dataset.row_groups)]
    return [row for table in tables for row in table.to_pylist()]


CORPUS = records(1500)
BROKEN = [b"{\n", b'{"dialog": [], "profile": []}\n', b"\xff\xfe\n", b"[]\n", lines(CORPUS)[0][:50] + b"\n"]


@pytest.fixture(scope="module")
def messy() -> list[bytes]:
    """1,500 sessions, 60 exact duplicates, 40 that differ in white space, 30 in profiles only, 5 broken lines."""
    r = random.Random(1)
    exact = [lines([item])[0] for item in r.sample(CORPUS, 60)]
    spaced = [json.dumps(item).encode() + b"\n" for item in r.sample(CORPUS, 20)]  # escapes: other bytes, same text
    wide = [
        lines([{**item, "dialog": [[u[0].replace(" ", "  \u3000") + " "] for u in item["dialog"]]}])[0]
        for item in r.sample(CORPUS, 20)
    ]
    people = [lines([{**item, "profile": records(1, seed=9)[0]["profile"]}])[0] for item in r.sample(CORPUS, 30)]
    return lines(CORPUS) + exact + spaced + wide + people + BROKEN


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, messy: list[bytes]) -> tuple[Path, Manifest]:
    return run(tmp_path_factory.mktemp("prepared"), {"all.jsonl": b"".join(messy)}, name="messy", valid=40, test=0.03)


def test_counts_add_up(prepared: tuple[Path, Manifest]) -> None:
    output, manifest = prepared
    assert manifest.records == 1500 + 60 + 40 + 30 + 5
    assert manifest.rejected == {"invalid_json": 2, "empty_dialogue": 1, "invalid_utf8": 1, "not_an_object": 1}
    assert manifest.duplicates == {"exact_record": 60, "dialogue_and_profiles": 100, "dialogue": 130}
    assert manifest.sessions == 1530
    assert sum(split.sessions for split in manifest.splits.values()) == 1530
    assert manifest.splits["valid"].sessions <= 40
    for split in SPLITS:
        facts = manifest.splits[split]
        assert facts.examples == sum(file.rows for file in facts.files) == len(rows(output, split))
    pairs = sum(facts.examples for facts in manifest.splits.values())
    pairs += sum(manifest.examples_left_out.values())
    once = sum(len(item["dialog"]) // 2 for item in CORPUS)
    assert once < pairs <= once + 30 * 4  # the 30 that differ in profiles only are sessions of their own
    related = {split: sum(row["persona_related"] for row in rows(output, split)) for split in SPLITS}
    assert 0.02 < related["train"] / manifest.splits["train"].examples < 0.1
    assert {split: rules["asked"] for split, rules in manifest.persona_related.items()} == related
    assert f"about the persona: train{related['train']:>20}  " in report(manifest)
    assert "1,635" in report(manifest)
    assert not (output / "_temporary").exists()


def test_rejects_are_kept_with_file_line_reason_and_text(prepared: tuple[Path, Manifest]) -> None:
    output, _ = prepared
    kept = [
        json.loads(line)
        for f in (output / "rejects").iterdir()
        for line in gzip.decompress(f.read_bytes()).splitlines()
    ]
    assert [(k["line"], k["reason"]) for k in kept] == [
        (1631, "invalid_json"),
        (1632, "empty_dialogue"),
        (1633, "invalid_utf8"),
        (1634, "not_an_object"),
        (1635, "invalid_json"),
    ]
    assert [k["raw"] for k in kept[:4]] == ["{", '{"dialog": [], "profile": []}', "\\xff\\xfe", "[]"]
    assert all(k["file"].endswith("all.jsonl") for k in kept)


def test_files_are_as_the_manifest_says(prepared: tuple[Path, Manifest]) -> None:
    output, manifest = prepared
    dataset = Dataset.open(str(output))
    for split in SPLITS:
        for file in manifest.splits[split].files:
            metadata = pq.read_metadata(output / file.path)
            assert file.row_groups == [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
            assert "dialog" not in pq.read_schema(output / file.path).names
        ids = [row["example_id"] for row in rows(output, split)]
        assert ids == sorted(set(ids))
    assert manifest.vocabulary == dataset.sizes
    assert dataset.manifest == manifest
    assert dataset.fingerprint == manifest.fingerprint


def test_vocabularies_count_the_surviving_training_sessions(tmp_path: Path) -> None:
    items = records(200, seed=3)
    output, _ = run(tmp_path, {"a.jsonl": b"".join(lines(items + items[:50]))}, valid=0, test=0, min_character_count=3)
    characters, words = Counter[str](), Counter[str]()
    for item in items:
        for utterance in item["dialog"]:
            characters.update(utterance[0].replace(" ", ""))
        for profile in item["profile"]:
            found = [{"male": "男", "female": "女"}[profile["gender"]], profile["loc"].replace(" ", "")]
            found += profile["tag"][0].split(";")
            words.update([*filter(None, found), "性别", "地址", "兴趣"])
            characters.update("".join(found))
    dataset = Dataset.open(str(output))
    expected = {c: n for c, n in characters.items() if n >= 3 or c in "性别地址兴趣男女"}
    got = dict(zip(dataset.characters.tokens, dataset.characters.counts, strict=True))
    assert {c: n for c, n in got.items() if n} == expected
    assert set("性别地址兴趣男女") <= set(got)
    assert dict(zip(dataset.persona_words.tokens, dataset.persona_words.counts, strict=True)) == dict(words)


def same_content(first: tuple[Path, Manifest], second: tuple[Path, Manifest]) -> None:
    (one, a), (other, b) = first, second
    assert a.fingerprint == b.fingerprint
    for name in ("characters.txt", "persona_words.txt"):
        assert (one / "vocabulary" / name).read_bytes() == (other / "vocabulary" / name).read_bytes()
    for split in SPLITS:
        for ours, theirs in zip(a.splits[split].files, b.splits[split].files, strict=True):
            assert (one / ours.path).read_bytes() == (other / theirs.path).read_bytes()
            assert ours.digest == theirs.digest
    names = ("records", "rejected", "duplicates", "sessions", "examples_left_out", "vocabulary")
    assert [getattr(a, name) for name in names] == [getattr(b, name) for name in names]


def test_the_same_bytes_from_other_files_blocks_and_compressions(
    tmp_path: Path, prepared: tuple[Path, Manifest], messy: list[bytes]
) -> None:
    pack = [bytes, gzip.compress, zstandard.compress, gzip.compress, bytes]
    suffix = ["jsonl", "jsonl.gz", "jsonl.zst", "jsonl.gz", "jsonl"]
    cuts = [0, 100, 101, 900, 1200, len(messy)]
    five = {
        f"{i}.{suffix[i]}": pack[i](b"".join(messy[cuts[i] : cuts[i + 1]]))  # type: ignore[operator]
        for i in range(5)
    }
    same_content(prepared, run(tmp_path, five, name="five", block_bytes=20_000, valid=40, test=0.03))


def test_the_same_bytes_from_many_tasks(
    tmp_path: Path, prepared: tuple[Path, Manifest], messy: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arplus.prepare.stages.SESSIONS_A_PARTITION", 400)
    monkeypatch.setattr("arplus.prepare.stages.MAX_GROUPS", 3)
    same_content(
        prepared,
        run(tmp_path, {"a": b"".join(messy)[:0], "b.jsonl": b"".join(messy)}, block_bytes=50_000, valid=40, test=0.03),
    )


def test_large_sets_are_cut_into_parts_whose_order_is_the_same(
    tmp_path: Path, prepared: tuple[Path, Manifest], messy: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arplus.prepare.stages.SESSIONS_A_PART", 400)
    output, manifest = run(tmp_path, {"a.jsonl": b"".join(messy)}, valid=40, test=0.03)
    assert len(manifest.splits["train"].files) == 4
    for split in SPLITS:
        assert rows(output, split) == rows(prepared[0], split)


def dialogue_of(row: dict[str, Any]) -> tuple[int, ...]:
    return (*row["context"], -1, *row["response"])


def test_no_dialogue_straddles_splits_and_growth_only_releases_to_training(tmp_path: Path) -> None:
    vocabulary = tmp_path / "characters.txt"
    vocabulary.write_text("\n".join([*CHARACTERS, *"性别男女址兴趣"]))
    persona = tmp_path / "persona.txt"
    persona.write_text("\n".join(["性别", "地址", "兴趣", "男", "女"]))
    people = [{**item, "profile": other["profile"]} for item, other in zip(CORPUS, records(1500, seed=5), strict=True)]
    where: list[dict[tuple[int, ...], set[str]]] = []
    for n in (700, 1500):
        content = {"a.jsonl": b"".join(lines(CORPUS[:n] + people[:n]))}
        output, manifest = run(
            tmp_path,
            content,
            name=str(n),
            valid=30,
            test=0.05,
            rules=ExampleRules(incomplete_personas="keep"),
            character_vocabulary=str(vocabulary),
            persona_vocabulary=str(persona),
        )
        assert 0 < manifest.splits["valid"].sessions <= 30
        found: dict[tuple[int, ...], set[str]] = {}
        for split in SPLITS:
            for row in rows(output, split):
                found.setdefault(dialogue_of(row), set()).add(split)
        where.append(found)
        assert all(len(splits) == 1 for splits in found.values())
        assert manifest.vocabulary == VocabularySizes(characters=len(CHARACTERS) + 7 + 9, persona_words=5 + 9)
    before, after = where
    moved = {(*before[d], *after[d]) for d in before if before[d] != after[d]}
    assert moved <= {("valid", "train")}


def test_every_duplicate_key_removes_its_own_duplicates(tmp_path: Path, messy: list[bytes]) -> None:
    for key, sessions in (("exact_record", 1570), ("dialogue", 1500)):
        _, manifest = run(tmp_path, {"a.jsonl": b"".join(messy)}, duplicate_key=key)
        assert manifest.sessions == sessions


def test_a_block_s_only_duplicate_is_removed(tmp_path: Path) -> None:
    items = lines(CORPUS[:30])
    content = {"a.jsonl": b"".join(items), "b.jsonl": items[7] + items[7].replace(b" ", b"  ")}
    _, manifest = run(tmp_path, content, duplicate_key="exact_record")
    assert (manifest.duplicates["exact_record"], manifest.sessions) == (1, 31)


def test_what_an_unfinished_preparation_left_does_not_matter(tmp_path: Path) -> None:
    content = {"a.jsonl": b"".join(lines(CORPUS[:50]))}
    _, expected = run(tmp_path, content, name="first", valid=20_000)
    left = tmp_path / "second-out"
    for name in ("_lease.json", "_temporary/sessions/000009-000000000000.arrow", "train/part-00009-0a1b2c3d.parquet"):
        (left / name).parent.mkdir(parents=True, exist_ok=True)
        (left / name).write_text("half")
    _, manifest = run(tmp_path, content, name="second", valid=20_000.0)
    assert manifest.fingerprint == expected.fingerprint
    assert [f"train/{file.name}" for file in (left / "train").iterdir()] == [
        file.path for file in manifest.splits["train"].files
    ]
    assert not (left / "_temporary").exists()
    assert not (left / "_lease.json").exists()


def refused(tmp_path: Path, content: dict[str, bytes], message: str, **settings: Any) -> None:
    with pytest.raises(UsageError, match=message):
        run(tmp_path, content, name="refused", **settings)
    assert not (tmp_path / "refused-out" / "manifest.json").exists()


def test_a_truncated_gzip_commits_nothing_and_names_the_file(tmp_path: Path) -> None:
    data = gzip.compress(b"".join(lines(CORPUS[:300])))
    refused(tmp_path, {"a.jsonl": lines(CORPUS)[0], "b.jsonl.gz": data[:-100]}, "b.jsonl.gz: the gzip stream is cut")


def test_too_many_rejects_commit_nothing_and_a_second_run_may_follow(tmp_path: Path) -> None:
    content = {"a.jsonl": b"".join(lines(CORPUS[:95]) + BROKEN)}
    refused(tmp_path, content, "5 of 100 records rejected.*2 invalid_json.*refused-out/rejects", max_reject_share=0.04)
    assert list((tmp_path / "refused-out" / "rejects").iterdir())
    _, manifest = run(tmp_path, content, name="refused", max_reject_share=0.05)
    assert manifest.sessions == 95


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "no record file"),
        ({"a.jsonl": b""}, "no record in it"),
        ({"a.jsonl": b"\n \n"}, "no record in it"),
        ({"a.jsonl": b"{\n"}, r"a.jsonl: every line is rejected \(1 of 1: invalid_json"),
    ],
)
def test_no_data_is_an_error(tmp_path: Path, content: dict[str, bytes], message: str) -> None:
    refused(tmp_path, content, message, max_reject_share=1.0)


@pytest.mark.parametrize("output", ["in", "in/b", "link/b"])
def test_an_output_in_the_input_is_refused(tmp_path: Path, output: str) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_bytes(b"".join(lines(CORPUS[:20])))
    (tmp_path / "other.jsonl").write_bytes(b"".join(lines(CORPUS[:20])))
    (tmp_path / "link").symlink_to(tmp_path / "in")
    before = sorted(tmp_path.rglob("*"))
    sets = {"input": str(tmp_path / "other.jsonl"), "evaluation_set": (f"official={tmp_path}/in",)}
    for given in ({"input": str(tmp_path / "in")}, sets):
        with pytest.raises(UsageError, match=f"--output {tmp_path}/{output}: is or lies in the input {tmp_path}/in;"):
            prepare(PrepareConfig(output=str(tmp_path / output), **given))
    assert sorted(tmp_path.rglob("*")) == before


def test_an_output_in_use_is_refused(tmp_path: Path) -> None:
    content = {"a.jsonl": b"".join(lines(CORPUS[:20]))}
    output, _ = run(tmp_path, content, name="twice")
    with pytest.raises(UsageError, match="holds a prepared data set"):
        run(tmp_path, content, name="twice")
    (output / "manifest.json").unlink()
    with pytest.raises(UsageError, match="is not empty"):
        run(tmp_path, content, name="twice")


CASES = Path(__file__).parent.parent / "cases"


def test_left_out_files_and_cut_profiles_are_in_output_and_card(tmp_path: Path) -> None:
    many = {**CORPUS[0], "profile": [{**CORPUS[0]["profile"][0], "tag": [";".join(map(str, range(20_000)))]}] * 2}
    content = {"a.JSONL": b"".join(lines([many, *CORPUS[1:40]])), "README.txt": b"read me\n", "_SUCCESS": b""}
    official = tmp_path / "official"
    official.mkdir()
    (official / "r.jsonl").write_bytes(lines(CORPUS[50:51])[0])
    (official / "notes.md").write_text("")
    output, manifest = run(tmp_path, content, name="left", valid=0, evaluation_set=(f"random={official}",))
    names = [
        {"name": "README.txt", "files": 1, "why": "not named as records are"},
        {"name": "_SUCCESS", "files": 1, "why": "hidden"},
    ]
    for where in (asdict(manifest), json.loads((output / "data_card.json").read_text())):
        assert where["records"] == 40
        assert where["source"]["files_left_out"] == {"files": 2, "names": names}
        assert where["evaluation_sets"]["random"]["files_left_out"]["names"][0]["name"] == "notes.md"
        assert where["profiles_cut"] == {"tags_left_out": 2 * 19_900, "words_cut": 0}
    text, page = report(manifest), (output / "data_card.html").read_text()
    for shown in (text, page):
        assert all(name in shown for name in ("README.txt", "_SUCCESS", "notes.md", "files left out of random"))
        assert "39,800" in shown
    assert text.endswith("validation: no session; training will keep its last checkpoint")
    width = max(len(row["profile_words"]) for row in rows(output, "train"))
    assert width <= 8 * 102


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            (CASES / "no_gender100.jsonl").read_bytes(),
            r"no training example; sessions: \d+ in train.* \d+ incomplete_persona \(a speaker lacks .*"
            "--incomplete-personas keep",
        ),
        (b"".join(lines([{**item, "dialog": item["dialog"][:1], "uid": [0]} for item in CORPUS[:60]])), "takes two"),
        (b"".join(lines([{**item, "dialog": [["好"], [" "]], "uid": [0, 1]} for item in CORPUS[:60]])), "empty_resp"),
    ],
)
def test_no_training_example_is_an_error_with_reasons_and_counts(tmp_path: Path, content: bytes, message: str) -> None:
    refused(tmp_path, {"a.jsonl": content}, message)


def test_incomplete_personas_that_are_kept_are_examples(tmp_path: Path) -> None:
    content = {"a.jsonl": (CASES / "no_gender100.jsonl").read_bytes()}
    _, manifest = run(tmp_path, content, rules=ExampleRules(incomplete_personas="keep"), valid=0, test=0)
    assert manifest.splits["train"].examples == 100
