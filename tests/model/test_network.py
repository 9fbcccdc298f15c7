"""The network: independence of batch mates, gradients everywhere, precision."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.small_models import SIZES, cast, gradients, make_batch, make_model, parts, persona_ids, small, take
from torch import Tensor

from arplus import kernels
from arplus.config import ModelConfig, Sampling, special_ids
from arplus.errors import UsageError
from arplus.model.attention import Attention
from arplus.model.batch import IGNORED, Batch, Packed
from arplus.model.generate import generate
from arplus.model.network import PersonaTransformer
from arplus.model.ops import Module, Operations


def all_logits(model: PersonaTransformer, batch: Batch) -> list[Tensor]:
    """Logits of both branches for each example, (length, 2, V)."""
    logits_NGV = model.head(model.hidden_and_weigh(batch)[0]).transpose(0, 1)
    return parts(logits_NGV, batch.response.sequences)


@torch.no_grad()
def test_training_computes_what_evaluation_does(config):
    """There is no dropout here; what evaluation may compute in another way must be the same."""
    model, batch = make_model(config), make_batch(config)
    torch.testing.assert_close(tuple(model.train()(batch)), tuple(model.eval()(batch)), atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("backend", ["plain", "cpu"])
@torch.no_grad()
def test_logits_do_not_depend_on_batch_mates_order_or_blocks(config, backend):
    model = make_model(config).double()  # what remains is the order of sums
    if backend != "plain":
        kernels.use(model, torch.device(backend))
    batch = make_batch(config, examples=6)
    expected = all_logits(model, batch)
    for index, blocks in (
        *(([i], None) for i in range(6)),
        ([5, 4, 3, 2, 1, 0], [1, 2, 3]),
        ([3, 0, 5], [0, 3, 0]),
        ([2, 2, 1, 4], [1, 1, 1, 1]),
        (range(6), [4, 2]),
    ):
        found = all_logits(model, take(batch, index, blocks))
        for i, logits in zip(index, found, strict=True):
            torch.testing.assert_close(logits, expected[i], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_the_loss_is_the_cross_entropy_of_each_target(config):
    model, batch = make_model(config), make_batch(config)
    expected = torch.zeros(2)
    for i in range(5):
        one = take(batch, [i])
        [logits_TGV] = all_logits(model, one)
        for logits_GV, target in zip(logits_TGV, one.target_N.tolist(), strict=True):
            expected -= logits_GV.log_softmax(-1)[:, target]
    torch.testing.assert_close(model(batch).together()[:2], expected)


@torch.no_grad()
def test_an_example_depends_on_all_its_parts(config):
    """Guards the tests above: a model that ignores an input would pass them."""
    model, batch = make_model(config), make_batch(config)

    def rotated(packed: Packed) -> Packed:
        """The same places with other ids."""
        return packed._replace(ids=packed.ids.roll(1))

    changes = {
        "context": rotated(batch.context),
        "speaker_N": batch.speaker_N.roll(1),
        "profiles": rotated(batch.profiles),
        "persona": rotated(batch.persona),
        "response": rotated(batch.response),
        "target_N": batch.target_N.roll(1),
    }
    if batch.infilled is not None:
        changes["infilled"] = rotated(batch.infilled)
    before = model(batch)
    for name, changed in changes.items():
        after = model(dataclasses.replace(batch, **{name: changed}))
        assert (after.sum_dialogue != before.sum_dialogue) == (name != "infilled"), name
        assert (after.sum_auxiliary != before.sum_auxiliary) == (name in ("infilled", "response", "target_N")), name


@torch.no_grad()
def test_nothing_before_a_token_depends_on_it(config):
    """No target is seen in advance."""
    model, batch = make_model(config), make_batch(config)
    before = all_logits(model, batch)
    ids = batch.response.ids.clone()
    last = batch.response.sequences.offsets[1:] - 1
    ids[last] = (ids[last] + 1) % special_ids(SIZES.characters).pad
    after = all_logits(model, dataclasses.replace(batch, response=batch.response._replace(ids=ids)))
    for one, other in zip(before, after, strict=True):
        assert one[:-1].equal(other[:-1])
        assert not one[-1].equal(other[-1])


def unknown_personas(config: ModelConfig, batch: Batch) -> Batch:
    """One profile, an unknown word, speaks everything."""
    unknown = [persona_ids(config).unk]
    return dataclasses.replace(
        batch,
        persona=Packed.of([unknown] * len(batch.example_id_B)),
        profiles=Packed.of([unknown]),
        speaker_N=torch.zeros_like(batch.speaker_N),
    )


def no_personas(config: ModelConfig, batch: Batch) -> Batch:
    nothing: list[int] = []
    profiles = [nothing] * len(batch.profiles.sequences)
    return dataclasses.replace(
        batch, persona=Packed.of([nothing] * len(batch.example_id_B)), profiles=Packed.of(profiles)
    )


def no_examples(config: ModelConfig, batch: Batch) -> Batch:
    return take(batch, [])


def no_blocks(config: ModelConfig, batch: Batch) -> Batch:
    return take(batch, [], [0, 0])


def one_token_contexts(config: ModelConfig, batch: Batch) -> Batch:
    """Without a last [SEP] to spare, so that the memory has no query either."""
    examples = len(batch.example_id_B)
    context = Packed.of([[special_ids(SIZES.characters).sep]] * examples)
    return dataclasses.replace(batch, context=context, speaker_N=torch.arange(examples))


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "change",
    [unknown_personas, no_personas, no_examples, no_blocks, one_token_contexts],
    ids=lambda f: f.__name__,
)
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch(
    config: ModelConfig, change: Callable[[ModelConfig, Batch], Batch], autocast: bool
) -> None:
    model = make_model(dataclasses.replace(config, dropout=0.1)).train()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses = model(change(config, make_batch(config)))
    for name, gradient in gradients(model, losses).items():
        assert gradient.isfinite().all(), name


def test_no_examples_have_no_loss_and_no_gradient(config):
    model = make_model(config)
    losses = model(take(make_batch(config), []))
    assert losses.sum_dialogue == losses.sum_auxiliary == 0
    assert not any(gradient.any() for gradient in gradients(model, losses).values())


def test_the_usual_batch_moves_every_parameter(config):
    """No dead parameters: each tensor's gradient has a non-zero entry."""
    model = make_model(config)
    for name, gradient in gradients(model, model(make_batch(config))).items():
        assert gradient.abs().max() > 0, name


def test_an_example_whose_targets_are_ignored_enters_no_sum_and_no_gradient(config):
    """So may a dummy fill a batch up to the size that a device wants."""
    model, batch = make_model(config).double(), make_batch(config)
    kept, lengths = [0, 2, 3], batch.response.sequences.lengths
    ignored_B = ~torch.isin(torch.arange(5), torch.tensor(kept))
    without = dataclasses.replace(
        batch, target_N=batch.target_N.masked_fill(ignored_B.repeat_interleave(lengths), IGNORED)
    )
    if batch.persona_related_B is not None:
        without = dataclasses.replace(
            without, persona_related_B=batch.persona_related_B.masked_fill(ignored_B, IGNORED)
        )
    part = model(without)
    alone = model(take(batch, kept))
    torch.testing.assert_close(part, alone)
    torch.testing.assert_close(gradients(model, part), gradients(model, alone))


@torch.no_grad()
def test_stacks_of_the_same_weights_are_a_shared_one():
    shared = make_model(small("arplus"))
    unshared = PersonaTransformer(dataclasses.replace(shared.config, shared_stacks=False), SIZES).eval()
    state = shared.state_dict()
    unshared.load_state_dict(state | {f"encoder_{name}": v for name, v in state.items() if name.startswith("layers.")})
    batch = make_batch(shared.config)
    assert unshared(batch) == shared(batch)


@torch.no_grad()
def test_a_folded_model_computes_the_same_without_the_wide_product(config):
    model, batch = make_model(config).double(), make_batch(config)
    expected, wide = model(batch), dict(model.named_parameters())
    model.fold()
    for found, loss in zip(model(batch), expected, strict=True):
        torch.testing.assert_close(found, loss, atol=1e-9, rtol=1e-9)
    gone = wide.keys() - dict(model.named_parameters()).keys()
    assert gone == {name for name in wide if config.ff_bottleneck and "contract" in name}


@pytest.mark.parametrize("preset", ["arplus", "no-memn2n", "no-rezero"])
@torch.no_grad()
def test_shared_layers_are_applied_in_order_and_then_again(preset):
    """Four layers in two repeats are 0, 1, 0, 1: the same as four layers of their own with those weights."""
    shared = make_model(small(preset))
    copied = PersonaTransformer(dataclasses.replace(shared.config, repeats=1), SIZES).eval()
    state = shared.state_dict()
    for name, value in list(state.items()):
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            state[f"layers.{int(i) + 2}.{rest}"] = value
    copied.load_state_dict(state)
    batch = make_batch(shared.config)
    torch.testing.assert_close(copied(batch), shared(batch))
    greedy = Sampling(temperature=0, max_characters=15)
    torch.testing.assert_close(generate(copied, batch, greedy), generate(shared, batch, greedy))


@torch.no_grad()
def test_a_persona_without_words_adds_nothing(config):
    """Whatever others have: the same as with no persona in the whole batch."""
    model, batch = make_model(config).double(), make_batch(config)
    nobody = all_logits(model, no_personas(config, batch))
    words = [part.tolist() for part in parts(*batch.persona)]
    mixed = all_logits(model, no_profiles(dataclasses.replace(batch, persona=Packed.of([*words[:-1], []]))))
    torch.testing.assert_close(mixed[-1], nobody[-1], atol=1e-9, rtol=1e-9)
    assert not mixed[0].allclose(nobody[0])
    if config.memory_hops:
        contexts = batch.context.sequences
        query_ND = torch.randn(int(contexts.offsets[-1]), config.d_model, dtype=torch.float64)
        assert not model.memory(no_personas(config, batch).persona, query_ND, contexts).any()


def no_profiles(batch: Batch) -> Batch:
    return dataclasses.replace(batch, profiles=Packed.of([[]] * len(batch.profiles.sequences)))


@torch.no_grad()
def test_int32_and_int64_ids_agree(config):
    model, batch = make_model(config), make_batch(config)
    assert model(cast(batch, torch.int32)) == model(cast(batch, torch.int64))


def test_bf16_autocast(config):
    model, batch = make_model(config).train(), make_batch(config)
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch)
    assert all(value is None or value.dtype == torch.float32 for value in rough)
    torch.testing.assert_close(rough, exact, rtol=0.03, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients(model, rough).values())


def test_tied_head():
    model = make_model(small("ar"))
    assert model.head.weight is model.characters.weight
    assert "characters.weight" in model.weights()
    assert "head.weight" not in model.weights()
    again = PersonaTransformer(model.config, SIZES)
    again.load_state_dict(model.state_dict())
    assert again.head.weight is again.characters.weight
    batch = make_batch(model.config)
    assert again.eval()(batch) == model(batch)


@torch.no_grad()
def test_weights_make_another_model_the_same(config):
    model, other, batch = make_model(config), make_model(config, seed=1), make_batch(config)
    assert other(batch) != model(batch)
    other.load_weights(model.weights())
    assert other(batch) == model(batch)


def test_weights_of_another_model_are_refused_and_change_nothing():
    model = make_model(small("arplus"))
    before = {name: value.clone() for name, value in model.weights().items()}
    given = {name: torch.zeros_like(value) for name, value in before.items()}
    transposed = given | {"head.weight": given["head.weight"].T}
    missing = {name: value for name, value in given.items() if name != "layers.0.r"}
    for wrong, named in (
        (transposed, "1 of .* head.weight"),
        (missing, "layers.0.r"),
        (given | {"new": torch.zeros(1)}, "new"),
        (make_model(small("ar")).weights(), "weights of another model"),
    ):
        with pytest.raises(UsageError, match=named):
            model.load_weights(wrong)
    assert all(value.equal(before[name]) for name, value in model.weights().items())


def test_initial_weights():
    """Xavier bounds, attention as torch's MultiheadAttention, gates at zero; the same seed gives the same weights."""
    config = small("arplus")
    torch.manual_seed(3)
    model = PersonaTransformer(config, SIZES)
    torch.manual_seed(3)
    again = PersonaTransformer(config, SIZES)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    bound = (6 / (SIZES.characters + config.embedding_size)) ** 0.5
    assert 0.9 * bound < model.characters.weight.abs().max() <= bound
    layer = model.layers[0]
    attention = layer.attention
    assert isinstance(attention, Attention)
    bound = (6 / (4 * config.d_model)) ** 0.5
    assert 0.9 * bound < attention.query_key_value.weight.abs().max() <= bound
    assert not attention.query_key_value.bias.any()
    assert not attention.output.bias.any()
    assert layer.r.item() == 0
    assert PersonaTransformer(dataclasses.replace(config, gate_start=0.5), SIZES).layers[0].r.item() == 0.5
    assert layer.feed_forward.narrow.bias.any()


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu-tanh"])
@torch.no_grad()
def test_the_activation_is_the_one_that_is_named(activation):
    expected = {
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "gelu-tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    }[activation]
    model = make_model(dataclasses.replace(small("no-factor-ff"), activation=activation))
    feed_forward, x_ND = model.layers[0].feed_forward, torch.randn(7, 32)
    wanted = feed_forward.contract(expected(feed_forward.expand(x_ND)))
    torch.testing.assert_close(feed_forward(x_ND), wanted, atol=1e-6, rtol=1e-6)


def test_dropout_is_on_in_training_alone(config):
    model, batch = make_model(dataclasses.replace(config, dropout=0.3)), make_batch(config)
    assert model(batch) == model(batch)
    model.train()
    first, second = model(batch), model(batch)
    assert first.sum_dialogue != second.sum_dialogue
    assert first.sum_auxiliary != second.sum_auxiliary


@pytest.mark.parametrize("training", [False, True])
def test_everything_that_drops_does_so_at_the_configured_rate(config, training):
    rates: dict[str, set[float]] = {"attend": set(), "dropout": set()}

    class Recorded(Operations):
        def __getattribute__(self, name: str) -> Any:
            operation = super().__getattribute__(name)
            if name not in rates:
                return operation
            return lambda *inputs: (rates[name].add(inputs[-1]), operation(*inputs))[1]

    model = make_model(dataclasses.replace(config, dropout=0.3)).train(training)
    recorded = Recorded()
    for module in model.modules():
        if isinstance(module, Module):
            module.ops = recorded
    model(make_batch(config))
    rate = {0.3 if training else 0.0}
    assert rates == {"attend": rate, "dropout": rate - {0.0}}
