"""Evaluation sees every example of a split once, and says what it measured by its right name."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from arplus.data.feed import Order, as_batch
from prepared import CHARACTERS, PERSONA_WORDS, random_state, write_dataset

from arplus import checkpoint
from arplus.config import EvaluateConfig, Sampling
from arplus.data.collate import Draws, Layout, Window
from arplus.data.dataset import Dataset
from arplus.errors import UserError
from arplus.evaluation.consistency import PersonaMetrics
from arplus.evaluation.evaluate import Evaluator, evaluate, nats_by_row, table
from arplus.evaluation.metrics import HonestMetrics, PaperMetrics
from arplus.evaluation.replies import Responder, raw_profile, sample_replies
from arplus.model.arplus import ARPlus
from arplus.model.batch import Batch
from arplus.text import Vocabulary

EXAMPLES = 141


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(
        tmp_path_factory.mktemp("data"), {"train": [[9]], "valid": [[20]], "test": [[100, 41]], "none": [[]]}
    )


def whole_split(dataset: Dataset, model: ARPlus) -> Batch:
    """All test examples as one batch."""
    order = Order(split=dataset.split("test"), batch_size=EXAMPLES, window_batches=1, seed=0, shuffled=False)
    layout = Layout.of(model.config, dataset.sizes)
    window = Window(order.read(0, 0, layout.columns), layout)
    return as_batch(window.batch(np.arange(EXAMPLES), np.ones(EXAMPLES, bool), Draws(0, 0)))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("preset_name", ["arplus", "ar"])
def test_the_perplexity_is_that_of_all_targets_at_once(dataset: Dataset, tmp_path: Path, preset_name: str) -> None:
    state = random_state(preset_name)
    uri = checkpoint.write(str(tmp_path / "checkpoint"), state)
    found = evaluate(EvaluateConfig(checkpoint=uri, data=dataset.uri, batch_size=16))
    assert set(found["splits"]) == {"test"}, "by default test and the evaluation sets, where they have examples"
    result = found["splits"]["test"]
    model = checkpoint.build_model(state)
    with torch.no_grad():
        losses = model(whole_split(dataset, model))
    expected = math.exp(float(losses.sum_dialogue / losses.count_dialogue))
    assert result["examples"] == EXAMPLES
    assert result["honest"]["response_ppl"] == pytest.approx(expected, rel=1e-5)
    assert result["paper_compatible"]["paper_ppl"] > 2 * expected, "it adds half of another loss"
    honest = {"response_ppl", "unigram_ppl", "bleu", "f1", "distinct_1", "distinct_2", "mean_length"}
    assert set(result["honest"]) == honest
    for group in ("honest", "paper-compatible", "persona"):
        assert group in table(found)


@pytest.mark.usefixtures("ray_cluster")
def test_the_papers_metrics_are_of_random_batches(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The paper's code means over random batches; ours are of like lengths, which changes BLEU, F1 and PPL."""
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    order = Order(split=dataset.split("test"), batch_size=16, window_batches=9, seed=0, shuffled=False)
    groups: dict[type, list[list[tuple[int, ...]]]] = {HonestMetrics: [], PaperMetrics: []}
    for kind, seen in groups.items():
        add = kind.add
        monkeypatch.setattr(
            kind,
            "add",
            lambda self, replies, references, add=add, seen=seen: (
                seen.append([tuple(i for i in row if i != self.special.pad) for row in references]),
                add(self, replies, references),
            ),
        )
    tally = Evaluator(order, EvaluateConfig(checkpoint=uri, data=dataset.uri, batch_size=16)).tally(0)
    assert (tally.examples, tally.paper.replies, tally.paper.batches, tally.paper.loss_batches) == (EXAMPLES, 141, 9, 9)
    honest, paper = groups.values()
    assert sorted(row for group in honest for row in group) == sorted(row for group in paper for row in group)

    assert all(len(set(mine) & set(theirs)) < 12 for mine in paper for theirs in honest), "of 16 of a batch"


@pytest.mark.parametrize("n", [1, 2])
def test_an_example_alone_in_its_batch_has_no_neighbours_persona(dataset: Dataset, tmp_path: Path, n: int) -> None:
    characters = Vocabulary([*CHARACTERS.tokens[:-3], *"是男女"])
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state(characters=characters))
    order = Order(split=dataset.split("test"), batch_size=n, window_batches=1, seed=0, shuffled=False)
    torch.backends.cuda.enable_cudnn_sdp(True)
    evaluator = Evaluator(order, EvaluateConfig(checkpoint=uri, data=dataset.uri))
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    examples = order.read(0, 0, [*evaluator.layout.columns, *({"target_words"} - set(evaluator.layout.columns))])
    asked = pa.array([[*characters.encode("是男是女").tolist(), characters.special.sep]] * n)
    examples = examples.set_column(examples.column_names.index("context"), "context", asked)
    man = pa.array([PERSONA_WORDS.encode(["性别", "男", "地址", "词1", "兴趣", "词2"])] * n)
    examples = examples.set_column(examples.column_names.index("target_words"), "target_words", man)
    window = Window(order.read(0, 0, evaluator.layout.columns), evaluator.layout)
    batch = as_batch(window.batch(np.arange(n), np.ones(n, bool), Draws(0, 0)))
    metrics = PersonaMetrics()
    evaluator._add_persona(metrics, batch, batch.response_BT, examples, torch.Generator())
    assert (metrics.questions, metrics.shuffled) == (n, n if n > 1 else 0)


@pytest.mark.parametrize("preset_name", ["arplus", "ar"])
def test_losses_by_row_add_up_to_the_batchs(dataset: Dataset, preset_name: str) -> None:
    model = checkpoint.build_model(random_state(preset_name))
    batch = whole_split(dataset, model)
    losses = model(batch)
    nats = nats_by_row(model, batch)
    assert nats.shape == (2, len(batch.response_BT))
    torch.testing.assert_close(nats.sum(1), torch.stack([losses.sum_dialogue, losses.sum_auxiliary]))


def test_the_same_seed_gives_the_same_replies(dataset: Dataset, tmp_path: Path) -> None:
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    config = EvaluateConfig(checkpoint=uri, data=dataset.uri, sampling=Sampling(temperature=3.0))
    first = evaluate(config)
    assert evaluate(config) == first
    other = evaluate(replace(config, seed=1))
    assert other["splits"]["test"]["honest"] != first["splits"]["test"]["honest"]


@pytest.mark.usefixtures("ray_cluster")
def test_two_checkpoints_on_two_splits(dataset: Dataset, tmp_path: Path) -> None:
    """A model with words as personas and one with characters see the same examples in the same order."""
    arplus, ar = (checkpoint.write(str(tmp_path / name), random_state(name)) for name in ("arplus", "ar"))
    config = EvaluateConfig(checkpoint=arplus, against=ar, data=dataset.uri, split=("test", "valid"))
    result = evaluate(config)
    other = evaluate(replace(config, checkpoint=ar, against=None))
    assert result["against"]["splits"] == other["splits"]
    assert set(result["comparison"]) == {"test", "valid"}
    for split, comparison in result["comparison"].items():
        for name, found in comparison.items():
            assert found["mine"] == pytest.approx(result["splits"][split]["honest"][name], rel=1e-5)
            assert found["other"] == pytest.approx(other["splits"][split]["honest"][name], rel=1e-5)
            assert found["low"] <= found["difference"] <= found["high"]
    assert "within noise" in table(result)


def test_other_vocabularies_and_unknown_splits_are_refused(dataset: Dataset, tmp_path: Path) -> None:
    longer = checkpoint.write(str(tmp_path / "other"), random_state(characters=Vocabulary([*CHARACTERS.tokens, "龘"])))
    with pytest.raises(UserError, match="its 40 characters are not the 41 of the checkpoint"):
        evaluate(EvaluateConfig(checkpoint=longer, data=dataset.uri))
    uri = checkpoint.write(str(tmp_path / "checkpoint"), random_state())
    with pytest.raises(UserError, match="no split 'tset'; it has train, valid, test, none"):
        evaluate(EvaluateConfig(checkpoint=uri, data=dataset.uri, split=("tset",)))
    with pytest.raises(UserError, match="--split none: has no examples"):
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
    with pytest.raises(UserError, match="nothing to answer"):
        replies(history=("  ",))
    with pytest.raises(UserError, match=r"--say.* is not UTF-8 text"):
        replies(history=("\udcff",))  # what Python makes of a command line's byte 0xFF


def test_sample_replies_show_context_persona_reference_and_reply(dataset: Dataset) -> None:
    text = sample_replies(random_state(), dataset, n=3)
    assert text.count("context") == text.count("reply") == 3
    assert "性别" in text
