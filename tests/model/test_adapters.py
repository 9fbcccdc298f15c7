"""Adapters: at first the network without them, then of effect in encoder and decoder; what is trained alone."""

import dataclasses

import pytest
import torch
from helpers.small_models import SIZES, make_batch, make_model, small
from torch import Tensor

from arplus.config import ModelConfig, Sampling, VocabularySizes
from arplus.errors import UsageError
from arplus.model.cost import component_of, live_parameters, train_only
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer


def adapted(base: PersonaTransformer) -> PersonaTransformer:
    """The same network with fresh adapters."""
    torch.manual_seed(0)
    model = PersonaTransformer(dataclasses.replace(base.config, adapter=6), SIZES)
    model.load_weights(model.weights() | base.weights())
    return model.train(base.training)


@pytest.mark.parametrize(("inner", "adapters"), [(8, 17_424), (64, 132_224), (256, 525_824), (2048, 4_199_424)])
def test_their_size(inner: int, adapters: int) -> None:
    with torch.device("meta"):
        model = PersonaTransformer(ModelConfig(adapter=inner), VocabularySizes())
    parts = live_parameters(model)
    assert parts["adapters"] == adapters
    assert sum(parts.values()) == 31_142_449 + adapters
    train_only(model, ("adapters", "norms and gates"))
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + 1_025


def test_each_unique_layer_has_two() -> None:
    with torch.device("meta"):
        model = PersonaTransformer(ModelConfig(adapter=64, repeats=1), VocabularySizes())
    assert live_parameters(model)["adapters"] == 6 * 132_224


@pytest.mark.parametrize("preset", ["arplus", "ar", "no-rezero", "no-albert"])
@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_fresh_ones_change_nothing(preset: str, training: bool) -> None:
    base = make_model(small(preset)).train(training)
    model, batch = adapted(base), make_batch(base.config)
    assert model.hidden_and_weigh(batch)[0].equal(base.hidden_and_weigh(batch)[0])
    if not training:
        greedy = Sampling(temperature=0, max_characters=9)
        assert generate(model, batch, greedy).equal(generate(base, batch, greedy))


def test_they_start_small() -> None:
    model = PersonaTransformer(dataclasses.replace(ModelConfig(), d_model=512, adapter=64), SIZES)
    for name, value in model.weights().items():
        if component_of(name) == "adapters":
            if name.endswith("down.weight"):
                assert 0.019 < value.abs().max() <= 0.02, "cut at two standard deviations"
                assert value.std().item() == pytest.approx(0.01 * 0.88, rel=0.02)  # of what is left after the cut
            else:
                assert not value.any()


@pytest.mark.parametrize("preset", ["adapters", "adapters-no-rezero"])
@pytest.mark.parametrize("which", ["attention_adapter", "feed_forward_adapter"])
@torch.no_grad()
def test_either_is_of_effect_in_the_encoder_and_in_the_decoder(preset: str, which: str) -> None:
    """The paper's code throws away what its decoder's adapter computes."""
    model, batch = make_model(small(preset)), make_batch(small(preset))

    memories = model.encode(batch)

    def found() -> tuple[list[Tensor], Tensor]:
        keys = [block.key_HBSC for blocks in model.encode(batch)[0] for block in blocks]
        return keys, model.decode(batch.response, memories)

    before = found()
    for name, parameter in model.named_parameters():
        if f"{which}.up" in name:
            parameter.zero_()
    after = found()
    assert not any(a.allclose(b) for a, b in zip(before[0], after[0], strict=True))
    assert not before[1].allclose(after[1])


@torch.no_grad()
def test_the_fixed_attention_passes_none() -> None:
    """Eq. 5's b·O_C reaches the sum behind a closed gate, whatever the adapters make of the branches."""
    model, batch = make_model(small("adapters")), make_batch(small("adapters"))
    for layer in model.layers:
        layer.r.zero_()
    before = model.hidden_and_weigh(batch)[0]
    for layer in model.layers:
        layer.attention_adapter.up.bias.fill_(9.0)
    assert model.hidden_and_weigh(batch)[0].equal(before)


def test_what_is_not_named_is_frozen() -> None:
    model = make_model(small("adapters")).train()
    train_only(model, ("adapters", "norms and gates"))
    losses = model(make_batch(model.config))
    (losses.sum_dialogue + losses.sum_auxiliary).backward()
    moved = {component_of(name) for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert moved == {"adapters", "norms and gates"}
    train_only(model, ())
    assert all(p.requires_grad for p in model.parameters())


def test_a_component_that_the_model_lacks_is_refused_with_those_it_has() -> None:
    with pytest.raises(UsageError, match="only: this model has no component 'adapters'; it has character table, "):
        train_only(make_model(small("arplus")), ("memory", "adapters"))
