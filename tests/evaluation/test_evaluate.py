"""Evaluation sees every example of a split once, and says what it measured by its right name."""

import csv
import json
import math
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers.prepared import CHARACTERS, PERSONA_WORDS, random_state, write_dataset

from arplus.config import EvaluateConfig, Sampling
from arplus.data.collate import BatchSpec, ExampleRng, Window
from arplus.data.dataset import Dataset
from arplus.data.sampler import EpochSampler
from arplus.errors import RunError, UsageError
from arplus.evaluation import evaluate as evaluate_module
from arplus.evaluation.evaluate import (
    BATCH_SIZES,
    EvaluationWorker,
    Evaluator,
    evaluate,
    nll_per_example,
    table,
    windows_of,
)
from arplus.evaluation.paper_metrics import PaperMetrics
from arplus.evaluation.replies import Responder, raw_profile, sample_replies
from arplus.kernels.cpu import CpuOperations
from arplus.model.batch import Batch
from arplus.model.network import PersonaTransformer
from arplus.runs import checkpoint
from arplus.text import Vocabulary

EXAMPLES = 141


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"),
        {"train": [[9]], "valid": [[20]], "test": [[100, 41]], "none": [[]], "one": [[1]], "two": [[2]]},
    )


def whole_split(dataset: Dataset, model: PersonaTransformer) -> Batch:
    """All test examples as one batch."""
    spec = BatchSpec.of(model.config, dataset.sizes)
    window = Window(windows_of(dataset.split("test")).read(0, 0, spec.columns), spec)
    return window.batch(np.arange(EXAMPLES), ExampleRng(0, 0))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("preset_name", ["arplus", "ar-weighted"])
def test_the_perplexity_is_that_of_all_targets_at_once(dataset: Dataset, tmp_path: Path, preset_name: str) -> None:
    state = random_state(preset_name)
    uri = checkpoint.write(str(tmp_path / "checkpoint"), state)
    found = evaluate(EvaluateConfig(checkpoint=uri, data=dataset.uri, split=("test",), batch_size=16))
    assert set(found["splits"]) == {"test"}, "by default test and the evaluation sets, where they have examples"
    result = found["splits"]["test"]
    model = checkpoint.build_model(state)
    with torch.no_grad():
        batch = whole_split(dataset, model)
        expected = math.exp(float(model(batch).sum_dialogue) / len(batch.target_N))
    assert result["examples"] == EXAMPLES
    assert result["standard"]["response_ppl"] == pytest.approx(expected, rel=1e-5)
    assert result["paper_compatible"]["paper_ppl"] > 2 * expected, "it adds half of another loss"
    standard = {"response_ppl", "unigram_ppl", "bleu", "f1", "distinct_1", "distinct_2", "mean_length"}
    assert set(result["standard"]) == standard
    groups = ["standard", "paper-compatible", "persona", *["predictor"] * (preset_name == "ar-weighted")]
    assert [line for line in table(found).splitlines() if line.replace("-", "").isalpha()] == groups


def evaluator(
    dataset: Dataset, folder: Path, split: str = "test", *, has_gpu: bool = False, **settings: object
) -> Evaluator:
    """One that needs no Ray."""
    state = settings.pop("state", None) or random_state()
    uri = checkpoint.write(str(folder / "checkpoint"), state)
    config = EvaluateConfig(checkpoint=uri, data=dataset.uri, **settings)
    return Evaluator(windows_of(dataset.split(split)), config, has_gpu)


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_worker_finds_wrong_is_told_in_its_own_words(dataset: Dataset, tmp_path: Path) -> None:
    shutil.copytree(dataset.uri, tmp_path / "data")
    for file in (tmp_path / "data" / "test").iterdir():
        file.write_bytes(file.read_bytes()[:-100])
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    with pytest.raises(UsageError, match=r"^/.*\.parquet: is damaged"):
        evaluate(EvaluateConfig(checkpoint=uri, data=str(tmp_path / "data"), split=("test",)))


def test_a_worker_without_its_checkpoint_or_memory_gives_that_as_its_result(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def result(worker: EvaluationWorker) -> object:
        return pickle.loads(worker({"id": [0]})["tally"][0].as_py())

    sampler, gone = windows_of(dataset.split("test")), str(tmp_path / "checkpoint")
    found = result(EvaluationWorker(sampler, EvaluateConfig(checkpoint=gone, data=dataset.uri), False))
    assert isinstance(found, UsageError)
    assert gone in str(found)

    def take(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(Evaluator, "tally", take)
    worker = EvaluationWorker(
        sampler, EvaluateConfig(checkpoint=checkpoint.write(gone, random_state()), data=dataset.uri), False
    )
    assert str(result(worker)) == "a GPU has too little memory for 64 examples at a time; lower --batch-size"


@pytest.mark.soak
@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_again_and_again_ends_the_evaluation(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the node has too little memory: Ray Data itself starts it again for ever."""

    class Dying(EvaluationWorker):
        def __call__(self, item: dict[str, Any]) -> pa.Table:
            os._exit(1)

    monkeypatch.setattr("arplus.evaluation.evaluate.EvaluationWorker", Dying)
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    with pytest.raises(RunError, match=r"died again and again .* a lower --batch-size needs less"):
        evaluate(EvaluateConfig(checkpoint=uri, data=dataset.uri, split=("test",)))


def test_the_papers_metrics_are_of_random_batches_of_its_size(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's code means over random batches of 64; ours are of like lengths, which changes BLEU, F1 and PPL."""
    groups: list[list[tuple[int, ...]]] = []
    add = PaperMetrics.add

    def noted(self: PaperMetrics, replies: list, references: list) -> None:
        groups.append([tuple(row) for row in references])
        add(self, replies, references)

    monkeypatch.setattr(PaperMetrics, "add", noted)
    one = evaluator(dataset, tmp_path, batch_size=16)
    tally = one.tally(0)
    assert (tally.examples, tally.paper.replies, tally.paper.batches, tally.paper.loss_batches) == (EXAMPLES, 141, 3, 3)
    assert [len(group) for group in groups] == [64, 64, 13]
    rows = one.sampler.read(0, 0, ["context", "response"]).to_pylist()
    in_order = [(*row["response"], one.special.eos) for row in sorted(rows, key=lambda row: len(row["context"]))]
    assert sorted(row for group in groups for row in group) == sorted(in_order)
    assert all(len(set(in_order[i : i + 64]) & set(group)) < 48 for i in (0, 64) for group in groups)


@pytest.mark.parametrize("preset_name", ["arplus", "ar"])
def test_how_many_are_taken_at_a_time_is_no_matter(dataset: Dataset, tmp_path: Path, preset_name: str) -> None:
    """Not for the losses, the drawn replies, the paper's batches or the personas that are swapped."""
    characters = Vocabulary([*CHARACTERS.tokens[:-3], *"是男女"])
    state = random_state(preset_name, characters)
    few, many, default = (
        evaluator(dataset, tmp_path, state=state, batch_size=size, against="other") for size in (7, 1000, None)
    )
    assert default.batch_size == BATCH_SIZES["cpu"] == 64
    expected = many.tally(0)
    assert expected.standard.result()["mean_length"] > 1
    for one in (few, default):
        tally = one.tally(0)
        for group, metrics in expected.result().items():
            assert tally.result()[group] == pytest.approx(metrics, rel=1e-5), group
        (mine,), (other,) = tally.samples, expected.samples
        np.testing.assert_array_equal(mine.example_id, other.example_id)
        np.testing.assert_allclose(mine.sums, other.sums, rtol=1e-4)


@pytest.mark.parametrize(("split", "n"), [("one", 1), ("two", 2), ("test", EXAMPLES)])
def test_questions_are_asked_again_under_another_examples_persona(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, split: str, n: int
) -> None:
    """Of the same window. There is none for an example that is alone."""
    characters = Vocabulary([*CHARACTERS.tokens[:-3], *"是男女"])
    one = evaluator(dataset, tmp_path, split, state=random_state(characters=characters))
    examples = one.sampler.read(0, 0, one.spec.columns)
    asked = pa.array([[*characters.encode("是男是女").tolist(), characters.special.sep]] * n)
    speakers = pa.array([[1]] * n)
    persona = pa.array(
        [PERSONA_WORDS.encode(["性别", "男", "地址", "词1", "兴趣", f"词{2 + i % 9}"]) for i in range(n)]
    )
    for name, column in (("context", asked), ("speakers", speakers), ("target_words", persona)):
        examples = examples.set_column(examples.column_names.index(name), name, column)
    monkeypatch.setattr(EpochSampler, "read", lambda *_: examples)
    seen: list[Batch] = []
    original = evaluate_module.generate
    monkeypatch.setattr(
        evaluate_module, "generate", lambda model, batch, *more: (seen.append(batch), original(model, batch, *more))[1]
    )
    metrics = one.tally(0).persona
    assert (metrics.questions, metrics.shuffled) == (n, n if n > 1 else 0)

    def personas(batches: list[Batch]) -> dict[int, tuple[int, ...]]:
        rows = ((b.example_id_B.tolist(), b.persona.ids.split(b.persona.sequences.lengths.tolist())) for b in batches)
        return {i: tuple(row.tolist()) for ids, parts in rows for i, row in zip(ids, parts, strict=True)}

    first, again = personas(seen[: len(seen) // 2 if n > 1 else 1]), personas(seen[len(seen) // 2 :])
    assert first == dict(enumerate(map(tuple, persona.to_pylist())))
    if n > 1:
        assert sorted(again.values()) == sorted(first.values())
        assert sum(first[i] != again[i] for i in range(n)) >= 0.7 * n


@pytest.mark.parametrize("preset_name", ["arplus", "ar-weighted"])
def test_the_personas_weight_is_what_is_asked_for(dataset: Dataset, tmp_path: Path, preset_name: str) -> None:
    """Whatever the model was trained with; what it predicts is measured all the same."""
    state = random_state(preset_name)
    if weighted := preset_name.endswith("weighted"):
        state.weights["predictor.w"].normal_(generator=torch.Generator().manual_seed(0))
    found = {
        weight: evaluator(dataset, tmp_path, state=state, persona_weight=weight).tally(0)
        for weight in ("auto", 0.0, 0.5, 1.0)
    }
    losses = {weight: tally.standard.loss_sum for weight, tally in found.items()}
    assert len(set(losses.values())) == (4 if weighted else 3)
    assert weighted or losses["auto"] == losses[1.0]
    for tally in found.values():
        assert tally.predictor == found["auto"].predictor
        assert ("predictor" in tally.result()) == weighted
    if weighted:
        measured = found["auto"].predictor.result()
        assert measured["share"] == 47 / EXAMPLES
        assert 0.3 < measured["auc"] < 0.7, "labels that have nothing to do with the examples"


def test_data_of_before_has_no_labels(dataset: Dataset, tmp_path: Path) -> None:
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state("arplus-weighted"))
    shutil.copytree(dataset.uri, tmp_path / "old")
    manifest = tmp_path / "old" / "manifest.json"
    facts = json.loads(manifest.read_text())
    del facts["persona_related"]
    manifest.write_text(json.dumps(facts))
    with pytest.raises(UsageError, match=r"has no labels for --model.persona-weight predicted.*prepare it again"):
        evaluate(EvaluateConfig(checkpoint=uri, data=str(tmp_path / "old")))


def test_models_compute_by_their_devices_kernels(dataset: Dataset, tmp_path: Path) -> None:
    one = evaluator(dataset, tmp_path, persona_weight=0.5)
    responder = Responder(one.state, raw_profile("男", "四川 成都", ""), Sampling(), seed=0)
    for model in (one.model, responder.model):
        assert isinstance(model.head.ops, CpuOperations)
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_a_gpus_arithmetic_changes_little(dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 autocast, here on the CPU: all of the evaluation runs in it, and the losses stay about the same."""
    one = evaluator(dataset, tmp_path)
    plain = one.tally(0)
    monkeypatch.setattr(evaluate_module, "autocast", lambda device: torch.autocast("cpu", torch.bfloat16))
    half = one.tally(0)
    assert half.standard.loss_sum != plain.standard.loss_sum
    assert half.standard.loss_sum == pytest.approx(plain.standard.loss_sum, rel=5e-3)


@pytest.mark.gpu
def test_a_gpu_evaluates_as_a_cpu(dataset: Dataset, tmp_path: Path, gpu: torch.device) -> None:
    plain = evaluator(dataset, tmp_path)
    there = evaluator(dataset, tmp_path / "gpu", has_gpu=True)
    assert (plain.device.type, there.device.type) == ("cpu", gpu.type)
    found, expected = there.tally(0), plain.tally(0)
    assert found.examples == expected.examples
    assert found.standard.loss_sum == pytest.approx(expected.standard.loss_sum, rel=5e-3)


def test_every_reply_is_written_with_its_loss(dataset: Dataset, tmp_path: Path) -> None:
    one = evaluator(dataset, tmp_path, replies="replies.csv", seed=5)
    tally = one.tally(0)
    examples = one.sampler.read(0, 0, ["context", "response", "target_words", "example_id"]).to_pylist()
    assert len(tally.replies) == EXAMPLES
    for row, example in zip(tally.replies, examples, strict=True):
        assert (row["split"], row["example"]) == ("test", example["example_id"])
        assert row["reference"] == one.state.characters.decode(example["response"])
        assert row["context"].count(" / ") == example["context"].count(one.special.sep) - 1
        assert row["persona"].startswith("性别 ")
    targets = [len(example["response"]) + 1 for example in examples]
    loss = sum(row["loss"] * n for row, n in zip(tally.replies, targets, strict=True)) / sum(targets)
    assert math.exp(loss) == pytest.approx(tally.standard.result()["response_ppl"], rel=1e-6)
    replies = [one.state.characters.encode(row["reply"]).tolist() for row in tally.replies]
    assert sum(map(len, replies)) == tally.standard.matches.reply_tokens


@pytest.mark.parametrize("preset_name", ["arplus", "ar"])
def test_losses_by_row_add_up_to_the_batchs(dataset: Dataset, preset_name: str) -> None:
    model = checkpoint.build_model(random_state(preset_name))
    batch = whole_split(dataset, model)
    losses = model(batch)
    nats, _ = nll_per_example(model, batch)
    assert nats.shape == (2, EXAMPLES)
    torch.testing.assert_close(nats.sum(1), torch.stack([losses.sum_dialogue, losses.sum_auxiliary]))


@pytest.mark.usefixtures("ray_cluster")
def test_the_same_seed_gives_the_same_replies(dataset: Dataset, tmp_path: Path) -> None:
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    config = EvaluateConfig(checkpoint=uri, data=dataset.uri, sampling=Sampling(temperature=3.0))
    first = evaluate(config)
    assert evaluate(config) == first
    other = evaluate(replace(config, seed=1))
    assert other["splits"]["test"]["standard"] != first["splits"]["test"]["standard"]


@pytest.mark.usefixtures("ray_cluster")
def test_two_checkpoints_on_two_splits(dataset: Dataset, tmp_path: Path) -> None:
    """A model with words as personas and one with characters see the same examples in the same order."""
    arplus, ar = (checkpoint.write(str(tmp_path / name), random_state(name)) for name in ("arplus", "ar"))
    file = tmp_path / "replies.csv"
    config = EvaluateConfig(checkpoint=arplus, against=ar, data=dataset.uri, split=("test", "valid"), seed=3)
    result = evaluate(replace(config, replies=str(file)))
    other = evaluate(replace(config, checkpoint=ar, against=None, replies=str(tmp_path / "other.jsonl")))
    assert result["against"]["splits"] == other["splits"]
    assert set(result["comparison"]) == {"test", "valid"}
    for split, comparison in result["comparison"].items():
        for name, found in comparison.items():
            assert found["mine"] == pytest.approx(result["splits"][split]["standard"][name], rel=1e-5)
            assert found["other"] == pytest.approx(other["splits"][split]["standard"][name], rel=1e-5)
            assert found["low"] <= found["difference"] <= found["high"]
    assert "within noise" in table(result)
    rows = {(row["split"], int(row["example"])): row for row in csv.DictReader(file.open(encoding="utf-8-sig"))}
    assert len(rows) == EXAMPLES + 20
    for row in map(json.loads, (tmp_path / "other.jsonl").read_text().splitlines()):
        mine = rows[row["split"], row["example"]]
        assert (mine["against_reply"], float(mine["against_loss"])) == (row["reply"], row["loss"])
        assert (mine["context"], mine["persona"], mine["reference"]) == tuple(
            row[name] for name in ("context", "persona", "reference")
        )
        assert mine["seed"] == "3"


def test_other_vocabularies_and_unknown_splits_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    longer = checkpoint.write(str(tmp_path / "other"), random_state(characters=Vocabulary([*CHARACTERS.tokens, "龘"])))
    with pytest.raises(UsageError, match="its 40 characters are not the 41 of the checkpoint"):
        evaluate(EvaluateConfig(checkpoint=longer, data=dataset.uri))
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    with pytest.raises(UsageError, match="no split 'tset'; it has train, valid, test, none, one, two"):
        evaluate(EvaluateConfig(checkpoint=uri, data=dataset.uri, split=("tset",)))
    with pytest.raises(UsageError, match="--split none: has no examples"):
        evaluate(EvaluateConfig(checkpoint=uri, data=dataset.uri, split=("none",)))


def test_a_responder_is_seeded_and_hears_persona_and_history() -> None:
    state = random_state()
    state.weights["memory.tables.1.weight"].mul_(50)  # at its random start a memory's answer is too faint to hear
    words = [t for t in PERSONA_WORDS.tokens if t.startswith("词")]

    def replies(seed: int = 0, tags: str = "", history: tuple[str, ...] = ("丁丂七",)) -> str:
        sampling = Sampling(temperature=2.0)
        return Responder(state, raw_profile("男", "四川 成都", tags), sampling, seed).reply(history)

    assert replies() == replies()
    assert len({replies(seed) for seed in range(4)}) > 1
    assert replies() != replies(tags=";".join(words))
    assert replies() != replies(history=("万丈", "三上", "丁丂七"))
    with pytest.raises(UsageError, match="nothing to answer"):
        replies(history=("  ",))
    with pytest.raises(UsageError, match=r"--say.* is not UTF-8 text"):
        replies(history=("\udcff",))  # what Python makes of a command line's byte 0xFF


@pytest.mark.parametrize("turns", range(1, 10))
def test_the_last_utterance_is_answered_whoever_began(turns: int) -> None:
    """The context is the last seven utterances, of which the last one is the other's."""
    state = random_state()
    responder = Responder(state, raw_profile("男", "四川 成都", ""), Sampling(), seed=0)
    said = ["丁", "丂", "七"] * 3
    (example,) = responder.example(said[:turns], responder.profile).to_pylist()
    context = "".join(state.characters.token(i) for i in example["context"]).removesuffix("[SEP]").split("[SEP]")
    assert context == ([""] * (turns % 2 == 0) + said[:turns])[-7:]
    assert example["speakers"][-1] == example["speakers"][0], "the other's"


def test_sample_replies_show_context_persona_reference_and_reply(dataset: Dataset) -> None:
    text = sample_replies(random_state(), dataset, n=3)
    assert text.count("context") == text.count("reply") == 3
    assert "性别" in text
