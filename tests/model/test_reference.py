"""Weights in the paper code's names: round trip, aliases, and clear errors."""

import dataclasses
import io

import pytest
import safetensors.torch
import torch
from helpers.small_models import SIZES, make_batch, make_model, small

from arplus.config import VocabularySizes
from arplus.errors import UsageError
from arplus.model.reference import from_reference, infer, load_reference, parse_state, sources


def reference_state(model, aliases: bool) -> dict[str, torch.Tensor]:
    """A model's weights under the paper code's names; with aliases, under all of them, and with what it never uses."""
    state: dict[str, torch.Tensor] = {}
    ours = model.state_dict()
    for name, names in sources(model.config).items():
        state |= dict.fromkeys(names if aliases else names[:1], ours[name])
    if aliases:
        state["context_emb.pos_encoder.pe"] = torch.zeros(5000, 1, model.config.embedding_size)
        state["post_encoder.layers.0.cls.weight"] = torch.zeros(3, 3)
    return state


@pytest.mark.parametrize("aliases", [False, True])
def test_round_trip(config, aliases):
    if config.adapter is not None:
        pytest.skip("adapters of the paper's code have another form and another place")
    model = make_model(config)
    state = reference_state(model, aliases)
    assert infer(state, dataclasses.replace(config, ff_size=7)) == (
        config, SIZES if config.memory_hops else VocabularySizes(characters=SIZES.characters)
    )  # fmt: skip
    loaded = load_reference(state, config, SIZES).eval()
    for name, value in model.state_dict().items():
        assert loaded.state_dict()[name].equal(value), name
    batch = make_batch(config)
    assert loaded(batch) == model(batch)


def test_any_one_of_the_aliases_is_enough():
    model = make_model(small("arplus"))
    state = reference_state(model, aliases=True)
    decoder_only = {k: v for k, v in state.items() if not k.startswith("post_encoder")}
    decoder_only = {f"module.{k}": v for k, v in decoder_only.items() if not k.startswith("context_emb.emb")}
    loaded = load_reference(decoder_only, model.config, SIZES)
    assert all(v.equal(loaded.state_dict()[k]) for k, v in model.state_dict().items())


def test_files_of_both_kinds():
    model = make_model(small("no-memn2n"))
    state = reference_state(model, aliases=False)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    golden = {f"param.{k}": v for k, v in state.items()} | {"grad.x": torch.zeros(1)}
    for data, name in (
        (buffer.getvalue(), "model.pt"),
        (safetensors.torch.save(state), "model.safetensors"),
        (safetensors.torch.save(golden), "golden.safetensors"),
    ):
        read = parse_state(data, name)
        assert read.keys() == state.keys()
        assert all(read[k].equal(v) for k, v in state.items())


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_a_broken_file_is_named(name):
    with pytest.raises(UsageError, match=name):
        parse_state(b"no weights at all", name)


def test_errors_name_the_tensors():
    model = make_model(small("arplus"))
    state = reference_state(model, aliases=True)
    lacking = {k: v for k, v in state.items() if k != "mem_output.2.emb.weight"}
    with pytest.raises(UsageError, match=r"mem_output\.2\.emb\.weight"):
        from_reference(lacking, model.config)
    with pytest.raises(UsageError, match=r"no place for surprise\.weight"):
        from_reference(state | {"surprise.weight": torch.zeros(1)}, model.config)
    with pytest.raises(UsageError, match="differ"):
        from_reference(state | {"output_emb.emb.weight": state["output_emb.emb.weight"] + 1}, model.config)
    with pytest.raises(UsageError, match=r"characters\.weight \(60, 24\) instead of \(61, 24\)"):
        load_reference(state, model.config, VocabularySizes(characters=61, persona_words=50))


@pytest.mark.parametrize(
    ("preset", "match"),
    [
        ("no-memn2n", "the file has a MemN2N memory and the preset has not"),
        ("no-factor-ff", "the file has a factored feed-forward layer"),
        ("no-albert", "the file has an embedding of its own width"),
    ],
)
def test_another_rows_preset_is_refused(preset, match):
    state = reference_state(make_model(small("arplus")), aliases=False)
    with pytest.raises(UsageError, match=match):
        infer(state, small(preset))


def test_a_preset_with_a_weight_predictor_is_refused():
    """That code's own cannot run."""
    state = reference_state(make_model(small("ar")), aliases=True)
    with pytest.raises(UsageError, match=r"this preset needs predictor\.w, predictor\.c, which the file lacks"):
        load_reference(state, small("ar-weighted"), SIZES)


def test_a_file_of_something_else_is_refused():
    with pytest.raises(UsageError, match="is it a state_dict of the paper's code"):
        infer({"encoder.weight": torch.zeros(2, 2)}, small("ar"))
