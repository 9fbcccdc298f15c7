"""Generated records: as many as asked for, the same for a seed, and of the statistics that were asked for."""

import gzip
import importlib.util
import json
import math
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import zstandard

from arplus.config import SynthesizeConfig, validate
from arplus.data.personas import Persona, persona_question
from arplus.data.records import Reject, parse_line
from arplus.errors import ResourceError, UsageError
from arplus.evaluation.consistency import agrees
from arplus.synthetic import write as module
from arplus.synthetic.phrases import language
from arplus.synthetic.write import Written, chatterbot_records, generate, synthesize

pytestmark = pytest.mark.usefixtures("generator")


def config(**changes):
    return SynthesizeConfig(**{"output": "somewhere", "records": 2000, **changes})


def lines(**changes):
    return list(generate(config(**changes)))


@pytest.fixture(scope="module")
def sample(generator):
    """Records as objects: enough for shares within a percent or so."""
    return [json.loads(line) for line in lines(records=30_000, seed=5)]


def utterances(records):
    return [turn[0] for record in records for turn in record["dialog"]]


# -------------------------------------------------------------------------------------------------- what is planted


@pytest.mark.parametrize(
    ("records", "duplicates", "broken"),
    [(10_000, 1_251, 197), (1_000, 900, 0), (500, 0, 500), (2, 1, 0), (1, 0, 0), (300, 298, 1)],
)
def test_counts_are_exact_under_every_meaning_of_duplicate(records, duplicates, broken):
    counts = Written()
    written = list(generate(config(records=records, duplicates=duplicates, broken=broken, persona_answers=0.3), counts))
    sessions = [parse_line(line) for line in written]
    good = [(line, s) for line, s in zip(written, sessions, strict=True) if not isinstance(s, Reject)]
    originals = records - duplicates - broken
    assert (len(written), len(good)) == (records, records - broken)
    assert len({line for line, _ in good}) == len(good) - duplicates // 2
    assert len({s.record_hash for _, s in good}) == originals
    assert len({s.dialogue_hash for _, s in good}) == originals
    assert counts == Written(
        records=records,
        originals=originals,
        exact_duplicates=duplicates // 2,
        space_duplicates=duplicates - duplicates // 2,
        broken=broken,
    )


def test_duplicates_follow_their_original_and_lie_near_and_far():
    first, distances = {}, []
    for i, line in enumerate(lines(records=60_000, duplicates=3_000)):
        key = parse_line(line).record_hash
        if key in first:
            distances.append(i - first[key])
        else:
            first[key] = i
    assert len(distances) == 3_000
    assert min(distances) < 500
    assert max(distances) > module.BLOCK


def test_half_of_the_duplicates_differ_in_white_space_only():
    originals, spaced = {}, 0
    for line in lines(records=3_000, duplicates=1_000):
        compact = "".join(line.decode().split())
        if compact in originals and originals[compact] != line:
            spaced += 1
        originals.setdefault(compact, line)
    assert spaced == 500


def test_broken_lines_are_of_many_kinds():
    results = map(parse_line, lines(records=400, broken=399))
    reasons = Counter(result.reason for result in results if isinstance(result, Reject))
    assert sum(reasons.values()) == 399
    assert {"invalid_json", "invalid_utf8", "not_an_object", "dialog", "profile", "uid_out_of_range"} <= set(reasons)


def test_no_two_record_numbers_share_a_code():
    words = language()
    n = 400_000_000  # SynthesizeConfig.records' limit
    assert words.code_words**2 == n
    numbers = np.concatenate([np.arange(200_000), np.arange(5_400_000, 5_500_000), np.arange(n - 100_000, n)])
    left, right = words.code(numbers, seed=7)
    pairs = np.sort((left - words.code_start) * words.code_words + right - words.code_start)
    assert (pairs[0] >= 0, pairs[-1] < n) == (True, True)
    assert (np.diff(pairs) > 0).all()
    # number · step + offset modulo n: all numbers are different if and only if the step has no factor in common with n.
    steps = (left - words.code_start) * words.code_words + right - words.code_start
    assert math.gcd(int((steps[1] - steps[0]) % n), n) == 1
    codes = words.texts[words.code_start : words.code_start + words.code_words]
    assert len(set(codes)) == len(codes)
    assert {len(word) for word in codes} == {2}


def test_settings_that_do_not_fit_name_their_flag():
    with pytest.raises(UsageError, match="--records: counts all lines, so it must be at least"):
        validate(config(records=10, duplicates=6, broken=5))
    with pytest.raises(UsageError, match="--duplicates: leave no record"):
        validate(config(records=10, duplicates=6, broken=4))
    with pytest.raises(UsageError, match="--persona-answers"):
        validate(config(persona_answers=1.5))
    with pytest.raises(UsageError, match="--output: is required"):
        validate(SynthesizeConfig())


# --------------------------------------------------------------------------------------------------- determinism


def test_the_same_settings_give_the_same_lines_and_another_seed_others():
    settings = {"records": 8_000, "duplicates": 100, "broken": 10, "persona_answers": 0.5}
    assert lines(**settings) == lines(**settings)
    assert len(set(lines(**settings)) & set(lines(**settings, seed=1))) < 20  # the fixed kinds of broken lines


# ---------------------------------------------------------------------------- statistics of guide/data.md's sample


def test_utterances_a_session(sample):
    counts = Counter(len(record["dialog"]) for record in sample)
    shares = {n: counts[n] / len(sample) for n in range(2, 7)}
    assert shares == pytest.approx({2: 0.59, 3: 0.22, 4: 0.12, 5: 0.02, 6: 0.02}, abs=0.015)
    assert np.mean([len(record["dialog"]) for record in sample]) == pytest.approx(2.79, abs=0.05)


def test_characters_an_utterance(sample):
    lengths = np.array([len("".join(text.split())) for text in utterances(sample)])
    assert (lengths.min(), lengths.max()) == (1, 140)
    assert np.median(lengths) == pytest.approx(10, abs=1)
    assert np.mean(lengths) == pytest.approx(14.2, abs=1)
    assert [np.mean(lengths <= n) for n in (5, 10, 15)] == pytest.approx([0.29, 0.55, 0.72], abs=0.05)
    assert np.minimum(lengths, 15).mean() == pytest.approx(9.5, abs=0.5)


def test_profiles(sample):
    profiles = [profile for record in sample for profile in record["profile"]]
    gender = Counter(profile["gender"] for profile in profiles)
    assert {k: n / len(profiles) for k, n in gender.items()} == pytest.approx(
        {"female": 0.59, "male": 0.385, "": 0.024}, abs=0.015
    )
    places = [profile["loc"] for profile in profiles]
    abroad = np.mean([place.startswith("海外 ") for place in places])
    two_parts = np.mean([" " in place for place in places]) - abroad
    elsewhere = np.mean([place == "其他" for place in places])
    assert [two_parts, elsewhere, abroad] == pytest.approx([0.64, 0.146, 0.078], abs=0.015)
    tags = [[tag for tag in profile["tag"][0].split(";") if tag] for profile in profiles]
    assert [np.mean([len(t) == n for t in tags]) for n in range(4)] == pytest.approx([0.42, 0.17, 0.08, 0.07], abs=0.02)
    assert max(len(tag) for t in tags for tag in t) <= 7
    empty = {"tag": [""], "loc": "", "gender": ""}
    assert np.mean([empty in record["profile"] for record in sample]) == pytest.approx(0.05, abs=0.01)


def test_speakers(sample):
    assert np.mean([len(record["profile"]) == 3 for record in sample]) == pytest.approx(0.05, abs=0.01)
    alternating = [record["uid"] == [i % 2 for i in range(len(record["uid"]))] for record in sample]
    assert 1 - np.mean(alternating) == pytest.approx(0.06, abs=0.015)
    assert all(set(record["uid"]) == set(range(len(record["profile"]))) for record in sample if len(record["uid"]) > 2)


def test_quirks(sample):
    texts = ["\n".join(utterances([record])) for record in sample]
    assert np.mean(["  " in text for text in texts]) == pytest.approx(0.09, abs=0.03)
    assert np.mean(["\u00a0\u00a0" in text for text in texts]) == pytest.approx(0.02, abs=0.01)
    everything = "".join(texts)
    assert all(mark in everything for mark in "～〜~？?\ufe0f")


# ---------------------------------------------------------------------------------------------- what can be learnt


def test_characters_follow_from_what_came_before():
    """A bigram model fitted on other records is far better than character frequencies."""

    def replies(seed):
        return [
            "^" + "".join(json.loads(line)["dialog"][1][0].split())[:15] + "$"
            for line in lines(records=8_000, seed=seed)
        ]

    train = replies(1)
    unigrams = Counter(c for text in train for c in text[1:])
    bigrams = Counter(pair for text in train for pair in pairwise(text))
    before = Counter(c for text in train for c in text[:-1])
    kinds = Counter(a for a, _ in bigrams)
    losses = [[], []]
    for text in replies(2):
        for a, b in pairwise(text):
            p = (unigrams[b] + 0.1) / (unigrams.total() + 0.1 * 5000)
            q = (bigrams[a, b] + kinds[a] * p) / (before[a] + kinds[a]) if before[a] else p
            losses[0].append(-math.log(p))
            losses[1].append(-math.log(q))
    unigram_ppl, bigram_ppl = (math.exp(np.mean(loss)) for loss in losses)
    assert unigram_ppl > 300
    assert bigram_ppl < unigram_ppl / 3


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_knob_sets_how_often_a_reply_tells_the_responders_persona(share):
    exchanges = asked = 0
    kinds = Counter()
    for line in lines(records=4_000, persona_answers=share):
        session = parse_line(line)
        for i in range(0, len(session.utterances) - 1, 2):
            exchanges += 1
            kind = persona_question(session.utterances[i][:15])
            if kind:
                profile = session.profiles[session.speakers[i + 1]]
                persona = Persona.from_words(profile.words)
                assert agrees(kind, session.utterances[i + 1][:15], persona)
                asked += 1
                kinds[kind] += 1
    # A profile with nothing in it cannot be asked for anything.
    assert asked / exchanges == pytest.approx(share * 0.976, abs=0.03)
    if share:
        assert min(kinds[kind] for kind in ("location", "gender", "hobby")) > 0.15 * asked


# -------------------------------------------------------------------------------------------- chatterbot-corpus


def test_chatterbot_conversations_become_records():
    records = list(chatterbot_records(seed=1))
    sessions = [parse_line(record) for record in records]
    assert len(records) > 400
    assert not any(isinstance(session, Reject) for session in sessions)
    assert any("你好" in session.utterances[0] for session in sessions)
    assert list(chatterbot_records(seed=1)) == records
    assert lines(records=10, chatterbot=True)[10:] == list(chatterbot_records(seed=0))


@pytest.mark.parametrize("missing", ["jieba", "chatterbot_corpus"])
def test_a_missing_extra_says_what_to_install(missing, monkeypatch, tmp_path):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find(name))
    language.cache_clear()
    with pytest.raises(UsageError, match=r"pip install -e '\.\[demo\]'"):
        synthesize(config(output=str(tmp_path / "out"), records=10, chatterbot=True))
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    language.cache_clear()


# ------------------------------------------------------------------------------------------------------- writing


def _unpack(path: Path) -> bytes:
    data = path.read_bytes()
    if path.suffix == ".gz":
        return gzip.decompress(data)
    if path.suffix == ".zst":
        return zstandard.ZstdDecompressor().stream_reader(data).read()
    return data


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst"])
def test_one_file(name, tmp_path):
    settings = {"records": 5_000, "duplicates": 50, "broken": 5, "chatterbot": True}
    path = tmp_path / "sub" / name
    counts = synthesize(config(output=str(path), **settings))
    assert _unpack(path) == b"".join(line + b"\n" for line in lines(**settings))
    assert counts.records == 5_000
    again = tmp_path / name
    synthesize(config(output=str(again), **settings))
    assert again.read_bytes() == path.read_bytes()
    assert [p.name for p in path.parent.iterdir()] == [name]


def test_a_folder_of_parts(tmp_path):
    settings = {"records": 2_500, "part_records": 1_000}
    synthesize(config(output=str(tmp_path / "parts"), **settings))
    parts = sorted((tmp_path / "parts").iterdir())
    assert [p.name for p in parts] == [f"part-0000{i}.jsonl.gz" for i in range(3)]
    assert [_unpack(p).count(b"\n") for p in parts] == [1_000, 1_000, 500]
    assert b"".join(map(_unpack, parts)) == b"".join(line + b"\n" for line in lines(**settings))


def test_outputs_that_cannot_be_written(tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "old.jsonl").write_text("mine")
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in {
        "full": "not empty",
        "file": "is a file",
        "folder.jsonl": "is a folder",
        "x.gz": "must end in",
        "file/below": "file/below: File exists",
        "old.jsonl": "the file exists; delete it or name another",
    }.items():
        with pytest.raises(UsageError, match=message):
            synthesize(config(output=str(tmp_path / name), records=10))
    assert {(tmp_path / name).read_text() for name in ("full/a", "file", "old.jsonl")} == {"mine"}


@pytest.mark.processes
def test_s3_that_does_not_answer_is_a_lack_of_resources(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "mine")
    with pytest.raises(ResourceError, match=r"^s3://bucket/raw: S3 refused or did not answer"):
        synthesize(config(output="s3://bucket/raw", records=10))


@pytest.mark.parametrize("name", ["parts", "x.jsonl.gz"])
def test_a_failure_in_mid_write_leaves_nothing(name, tmp_path, monkeypatch):
    def fail(*_args, **_kwargs):
        raise RuntimeError("boom")

    monkeypatch.setattr(module, "chatterbot_records", fail)
    with pytest.raises(RuntimeError, match="boom"):
        synthesize(config(output=str(tmp_path / name), records=3_000, part_records=1_000, chatterbot=True))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.processes
def test_the_job(tmp_path):
    job = [sys.executable, "jobs/synthesize.py", "--records", "50", "--duplicates", "4", "--broken", "2", "--seed", "1"]
    done = subprocess.run([*job, "--output", str(tmp_path / "x.jsonl")], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["originals"] == 44
    assert len((tmp_path / "x.jsonl").read_bytes().splitlines()) == 50
    wrong = subprocess.run([*job, "--output", str(tmp_path / "y"), "--recrds", "3"], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert "did you mean --records" in wrong.stderr
