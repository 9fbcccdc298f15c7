"""Features of a frozen pretrained model: what they are, that nothing leaks through them, and that it stays as it is."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prepared import random_state, write_dataset
from helpers.pretrained import make_pretrained
from helpers.small_models import SIZES, make_batch, parts, small, take
from torch import Tensor

from arplus.config import (
    ExampleRules,
    ExportConfig,
    FeaturesConfig,
    ModelConfig,
    Sampling,
    TrainConfig,
    VocabularySizes,
    preset,
)
from arplus.errors import UsageError
from arplus.evaluation.replies import Responder, raw_profile
from arplus.model.batch import Batch, Packed
from arplus.model.cost import live_parameters
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer
from arplus.pretrained.features import attach, resolved
from arplus.runs import checkpoint
from arplus.runs.export import export
from arplus.runs.folder import RunFolder
from arplus.text import Vocabulary
from arplus.training.estimate import report
from arplus.training.start import load, resolve

pytestmark = pytest.mark.usefixtures("one_thread")

CHARACTERS = Vocabulary([chr(0x4E00 + i) for i in range(SIZES.characters - 9)])
TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *CHARACTERS.tokens[::-1]]
XLNET = {"d_model": 32, "n_layer": 3, "n_head": 4, "d_inner": 48}


def pretrained(folder: Path, kind: str, **changes: Any) -> Any:
    return make_pretrained(folder, kind, TOKENS, **(XLNET if kind == "XLNet" else {}) | changes)


def config(folder: Path, row: str = "arplus", **features: Any) -> ModelConfig:
    return resolved(dataclasses.replace(small(row), features=FeaturesConfig(path=str(folder), **features)))


def network(of: ModelConfig, seed: int = 0) -> PersonaTransformer:
    torch.manual_seed(seed)
    model = PersonaTransformer(of, SIZES).eval()
    for name, parameter in model.named_parameters():
        if name.endswith(".r"):
            parameter.data.fill_(0.4)
    return attach(model, CHARACTERS, ExampleRules())


@pytest.mark.parametrize(
    ("features", "live"),
    [
        *(({"use": "replace", "width": H}, n) for H, n in ((256, 29_345_649), (312, 29_368_049), (768, 29_550_449))),
        *(({"use": "add", "width": H}, n) for H, n in ((256, 31_193_849), (384, 31_219_449), (1024, 31_347_449))),
        *(({"use": "encoder", "width": H}, n) for H, n in ((256, 31_274_033), (384, 31_339_569), (768, 31_536_177))),
    ],
)
def test_trained_parameters(features: dict[str, Any], live: int) -> None:
    of = dataclasses.replace(preset("arplus").model, features=FeaturesConfig(path="x", **features))
    with torch.device("meta"):
        model = PersonaTransformer(of, VocabularySizes())
    counts = live_parameters(model)
    assert sum(counts.values()) == live
    assert counts["features"] > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Bert", "Electra", "Albert", "XLNet"])
def test_features_are_the_models_hidden_states(tmp_path: Path, kind: str) -> None:
    theirs = pretrained(tmp_path, kind)
    model = network(config(tmp_path, layers="-2,0"))
    packed = take(make_batch(model.config), range(5), [2, 3]).context
    assert model.frozen is not None
    found, first = model.frozen.contextual(packed)
    words = model.frozen.pointwise(packed, 0)
    place = {token: i for i, token in enumerate(TOKENS)} | {"[SEP]": 3}
    start = 0
    for ids in parts(*packed):
        their_ids = torch.tensor([[2, *(place[CHARACTERS.token(i)] for i in ids.tolist())]])
        states = theirs(input_ids=their_ids, output_hidden_states=True).hidden_states
        part = slice(start, start := start + len(ids))
        torch.testing.assert_close(found[part], states[-2][0, 1:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(first[part], states[0][0, 1:], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(words[part], states[0][0, 1:], atol=1e-6, rtol=1e-5)


USES = [
    {"use": "replace", "layers": "-1,-2", "combine": "weighted"},
    {"use": "add", "layers": "-1,-2", "combine": "concat"},
    {"use": "encoder", "layers": "-1,-2"},
]


def logits(model: PersonaTransformer, batch: Batch) -> list[Tensor]:
    """Of both branches for each example, (length, 2, V)."""
    return parts(model.head(model.hidden_and_weigh(batch)[0]).transpose(0, 1), batch.response.sequences)


@pytest.mark.parametrize("features", USES, ids=lambda features: features["use"])
def test_nothing_leaks_and_every_parameter_is_used(tmp_path: Path, features: dict[str, Any]) -> None:
    pretrained(tmp_path, "Albert")
    model = network(config(tmp_path, **features))
    batch = make_batch(model.config)
    before = logits(model, batch)
    ids = batch.response.ids.clone()
    last = batch.response.sequences.offsets[1:] - 1
    ids[last] = (ids[last] + 1) % 51
    after = logits(model, dataclasses.replace(batch, response=batch.response._replace(ids=ids)))
    for one, other in zip(before, after, strict=True):
        assert one[:-1].equal(other[:-1])
        assert not one[-1].equal(other[-1])
    for i in range(5):
        torch.testing.assert_close(logits(model, take(batch, [i]))[0], before[i], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat(logits(model, take(batch, range(5), [0, 2, 3]))), torch.cat(before))
    losses = model.train()(batch)
    (losses.sum_dialogue + losses.sum_auxiliary).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    words = batch.context.ids.roll(1)
    assert model(dataclasses.replace(batch, context=Packed(words, batch.context.sequences))) != losses


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Bert", "Electra", "Albert", "XLNet"])
def test_replies_with_a_cache_are_those_without(tmp_path: Path, kind: str) -> None:
    pretrained(tmp_path, kind)
    model = network(config(tmp_path))
    batch = make_batch(model.config)
    replies = generate(model, batch, Sampling(temperature=0, max_characters=9, min_characters=9))
    bos = CHARACTERS.special.bos
    for i, reply in enumerate(replies.tolist()):
        whole = Packed.of([[bos, *reply[:-1]]])
        scores = model.head(model.decode(whole, model.encode(take(batch, [i]))))
        assert scores[:, :51].argmax(-1).tolist() == reply


def test_the_pretrained_model_is_not_trained_nor_saved(tmp_path: Path) -> None:
    pretrained(tmp_path, "Bert")
    model = network(config(tmp_path)).train()
    theirs = model.frozen.network  # type: ignore[union-attr]
    before = {name: value.clone() for name, value in theirs.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    batch = make_batch(model.config)
    curve = []
    for _ in range(3):
        loss = model(batch).sum_dialogue
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert curve[-1] < curve[0]
    assert not theirs.training
    assert all(value.equal(before[name]) for name, value in theirs.state_dict().items())
    assert not any("frozen" in name for name in model.state_dict())
    assert "characters.weight" not in model.state_dict()


def test_a_checkpoint_finds_its_model_and_the_card_of_an_export_names_it(tmp_path: Path) -> None:
    make_pretrained(tmp_path / "electra", "Electra")
    state = random_state()
    of = dataclasses.replace(state.config.model, features=FeaturesConfig(path=str(tmp_path / "electra")))
    of = resolved(of)
    weights = PersonaTransformer(of, state.sizes).weights()
    state = dataclasses.replace(state, config=dataclasses.replace(state.config, model=of), weights=weights)
    written = checkpoint.write(str(tmp_path / "checkpoint"), state)
    exported = export(ExportConfig(checkpoint=written, output=str(tmp_path / "exported")))
    responder = Responder(checkpoint.load(exported), raw_profile("女", "", ""), Sampling(), seed=0)
    assert responder.reply(["一丁"])
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"Its features are of {of.features.path} (weights of SHA-256 `{of.features.digest}`)" in card
    make_pretrained(tmp_path / "electra", "Electra", seed=2)
    with pytest.raises(UsageError, match="its weights are not those of before"):
        checkpoint.build_model(checkpoint.load(exported))


def test_a_dry_run_counts_what_is_trained_and_what_is_frozen(tmp_path: Path) -> None:
    theirs = pretrained(tmp_path, "Electra")
    run = dataclasses.replace(
        preset("arplus"), model=dataclasses.replace(preset("arplus").model, features=FeaturesConfig(path=str(tmp_path)))
    )
    said = report(run)
    assert f"live parameters: {31_142_449 - 1_899_600 + 2 * (32 + 1) * 200:,}\n" in said
    assert f"frozen beside them: {sum(p.numel() for p in theirs.parameters()):,} (0.00 GiB" in said


# ------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("features", "problem"),
    [
        ({"layers": "-5"}, "--model.features.layers: -5 is not a layer of 3 and the embeddings, 0"),
        ({"layers": "4"}, "--model.features.layers: 4 is not a layer"),
    ],
)
def test_what_cannot_serve_is_refused(tmp_path: Path, features: dict[str, Any], problem: str) -> None:
    pretrained(tmp_path, "Electra")
    with pytest.raises(UsageError, match=problem):
        network(config(tmp_path, **features))


def test_contexts_that_are_too_long_and_a_foreign_vocabulary_are_refused(tmp_path: Path) -> None:
    pretrained(tmp_path, "Electra", max_position_embeddings=112)
    of = config(tmp_path)
    with pytest.raises(UsageError, match="has 112 positions, and the data's contexts are up to 112 characters"):
        network(of)
    (tmp_path / "vocab.txt").write_text("[PAD]\n[CLS]\n一\n")
    with pytest.raises(UsageError, match="knows 2% of the text's characters"):
        network(of)


def test_other_weights_are_refused_when_the_run_goes_on(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [[40]], "valid": [[5]]})
    make_pretrained(tmp_path / "electra", "Electra")
    run = TrainConfig(
        model=dataclasses.replace(small("arplus"), features=FeaturesConfig(path=str(tmp_path / "electra"))),
        data=data.uri,
        storage=str(tmp_path / "runs"),
        run_name="first",
    )
    started = resolve(run)
    assert started.model.features.width == 32
    RunFolder(f"{started.storage}/first").config.write(started)
    assert resolve(run) == started
    load(started, None)
    make_pretrained(tmp_path / "electra", "Electra", hidden_dropout_prob=0.2, seed=5)
    for again in (lambda: resolve(run), lambda: load(started, None)):
        with pytest.raises(
            UsageError, match=r"its weights are not those of before .*; .* take another --run-name|, or take"
        ):
            again()
