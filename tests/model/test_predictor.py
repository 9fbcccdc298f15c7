"""The weight predictor: a of Eq. 1 scales O_T, or the memory's answer, and L_W trains it."""

import dataclasses

import pytest
import torch
from helpers.small_models import SIZES, gradients, make_batch, make_model, small, take
from torch.nn.functional import binary_cross_entropy

from arplus.config import ModelConfig, special_ids
from arplus.model.batch import IGNORED, Batch, Packed
from arplus.model.network import PersonaTransformer


@pytest.fixture(params=["ar", "arplus", "no-memn2n", "no-rezero"])
def config(request) -> ModelConfig:
    return dataclasses.replace(small(request.param), persona_weight="predicted")


def without_predictor(model: PersonaTransformer) -> PersonaTransformer:
    """The same weights in the row that has none."""
    plain = PersonaTransformer(dataclasses.replace(model.config, persona_weight="one"), SIZES).eval()
    plain.load_weights({name: value for name, value in model.weights().items() if "predictor" not in name})
    return plain


def weights_of(model: PersonaTransformer, batch: Batch) -> torch.Tensor:
    """The predicted a of each example."""
    _, z_B = model.encode_and_weigh(batch)
    assert z_B is not None
    return z_B.sigmoid()


def test_a_fixed_at_one_is_the_row_without_predictor_to_the_bit(config):
    model, batch = make_model(config), make_batch(config)
    plain = without_predictor(model)
    model.persona_weight = 1
    assert model.hidden_and_weigh(batch)[0].equal(plain.hidden_and_weigh(batch)[0])
    expected = gradients(plain, plain(batch))
    losses = model(batch)
    found = gradients(model, losses._replace(sum_weight=0 * losses.sum_weight))  # λ2
    assert not any(found.pop(f"predictor.{name}").any() for name in "wc")
    assert found.keys() == expected.keys()
    assert all(found[name].equal(value) for name, value in expected.items())


@torch.no_grad()
def test_a_fixed_at_zero_silences_the_persona(config):
    model, batch = make_model(config), make_batch(config)
    other = dataclasses.replace(batch, persona=batch.persona._replace(ids=batch.persona.ids.roll(1)))
    for weight, same in ((0, True), (0.1, False), (1, False), (None, False)):
        for each in (model, without_predictor(model)):
            each.persona_weight = weight
            assert each.hidden_and_weigh(batch)[0].equal(each.hidden_and_weigh(other)[0]) == same, weight


@torch.no_grad()
def test_the_predicted_weights_are_used(config):
    """Each example's own: the same as if it were fixed there, alone."""
    model, batch = make_model(config).double(), make_batch(config)
    model.predictor.c.zero_()
    model.predictor.w.div_(3)
    a_B = weights_of(model, batch)
    assert a_B.max() - a_B.min() > 0.05
    hidden = model.hidden_and_weigh(batch)[0].split(batch.response.sequences.lengths.tolist(), 1)
    for i, a in enumerate(a_B.tolist()):
        model.persona_weight = a
        alone = model.hidden_and_weigh(take(batch, [i]))[0]
        torch.testing.assert_close(alone, hidden[i], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_what_a_is_predicted_from(config):
    """With a memory the context's last utterance alone, as it goes in; else all of the encoded context."""
    model = make_model(config).double()
    batch = make_batch(config, examples=2)
    sep = special_ids(SIZES.characters).sep
    rows = [[1, 2, sep, 3, 4, 5, sep], [6, sep]]
    before = weights_of(model, with_contexts(batch, rows))
    assert not weights_of(model, with_contexts(batch, [[1, 2, sep, 3, 9, 5, sep], [6, sep]]))[0].allclose(before[0])
    earlier = weights_of(model, with_contexts(batch, [[1, 9, sep, 3, 4, 5, sep], [6, sep]]))
    assert earlier[0].allclose(before[0]) == (config.memory_hops > 0)
    assert earlier[1].allclose(before[1])
    if config.memory_hops:
        changed = dataclasses.replace(with_contexts(batch, rows), persona=make_batch(config, 2, seed=5).persona)
        assert weights_of(model, changed).equal(before), "the memory's answer comes later"
        # The mean of the three characters and their [SEP], each of which has a place of its own in the sum.
        x_ND = inputs_of(model, with_contexts(batch, rows))
        z = (x_ND[3:7].mean(0) * model.predictor.w).sum() + model.predictor.c
        torch.testing.assert_close(z.sigmoid()[0], before[0])


def with_contexts(batch: Batch, rows: list[list[int]]) -> Batch:
    """Other contexts, all said by the first profile."""
    return dataclasses.replace(
        batch, context=Packed.of(rows), speaker_N=torch.zeros(sum(map(len, rows)), dtype=torch.long)
    )


def inputs_of(model: PersonaTransformer, batch: Batch) -> torch.Tensor:
    """What goes into the encoder but for the memory's answer."""
    profiles = batch.profiles.sequences.sum(model.persona_words(batch.profiles.ids))
    return model.context_input(model.characters(batch.context.ids), batch.context.sequences, profiles[batch.speaker_N])


def test_l_w_is_the_binary_cross_entropy_of_the_labels(config):
    model, batch = make_model(config).double(), make_batch(config)
    a_B = weights_of(model, batch)
    r_B = torch.tensor([1, 0, IGNORED, 1, 1])
    losses = model(dataclasses.replace(batch, persona_related_B=r_B))
    counted = [0, 1, 3, 4]
    expected = binary_cross_entropy(a_B[counted], r_B[counted].double(), reduction="sum")
    torch.testing.assert_close(losses.sum_weight, expected)
    torch.testing.assert_close(losses.sum_a, a_B[counted].sum())


def test_l_d_trains_the_predictor_too(config):
    """B's weight is not detached."""
    model = make_model(config)
    found = gradients(model, model(make_batch(config))._replace(sum_weight=None))
    assert all(found[f"predictor.{name}"].any() for name in "wc")
    plain = without_predictor(model)
    assert len(list(plain.parameters())) == len(list(model.parameters())) - 2


def test_the_same_seed_gives_the_same_other_weights(config):
    """So a row and the same with a predictor start alike, from a = 1/2 for all."""
    found = []
    for persona_weight in ("one", "predicted"):
        torch.manual_seed(1)
        found.append(PersonaTransformer(dataclasses.replace(config, persona_weight=persona_weight), SIZES))
    plain, model = found
    assert all(value.equal(model.weights()[name]) for name, value in plain.weights().items())
    assert (weights_of(model, make_batch(config)) == 0.5).all()
