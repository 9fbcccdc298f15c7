"""The network: its size, independence of batch mates, gradients everywhere, precision."""

import dataclasses
import functools

import pytest
import torch
from small_models import SIZES, make_batch, make_model, small
from torch._dynamo.utils import counters

from arplus.config import PAPER_ROWS, PRESETS, Sampling, VocabularySizes, special_ids
from arplus.model.arplus import ARPlus
from arplus.model.attention import Attention
from arplus.model.batch import Batch
from arplus.model.cost import forward_backward_flops, live_parameters
from arplus.model.generate import generate

LIVE = {
    "ar": 23_777_280,
    "arplus": 31_142_449,
    "no-rezero": 31_144_496,
    "no-albert": 44_752_566,
    "no-factor-ff": 32_727_401,
    "no-memn2n": 8_740_633,
    "no-bart-mlm": 31_142_449,
}


def rows(batch: Batch, index) -> Batch:
    tensors = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return Batch(**{k: None if v is None else v[index] for k, v in tensors.items()})


def trimmed(model: ARPlus, batch: Batch) -> Batch:
    """The same examples without padding that none of them needs."""

    def cut(ids, pad):
        return ids[..., : int((ids != pad).sum(-1).max())]

    context = cut(batch.context_BS, model.pad)
    return dataclasses.replace(
        batch,
        context_BS=context,
        context_profile_BS=batch.context_profile_BS[:, : context.shape[1]],
        profiles_BPW=cut(batch.profiles_BPW, model.persona_pad),
        target_persona_BK=cut(batch.target_persona_BK, model.persona_pad),
        response_BT=cut(batch.response_BT, model.pad),
        infilled_BU=None if batch.infilled_BU is None else cut(batch.infilled_BU, model.pad),
    )


def all_logits(model: ARPlus, batch: Batch) -> list[torch.Tensor]:
    """Logits of both branches at the real positions of each example."""
    memories = model.encode(batch)
    infilled = [] if batch.infilled_BU is None else [model.encode_infilled(batch.infilled_BU)]
    branches = [model.generator(model.decode(batch.response_BT, m)) for m in (memories, infilled)]
    real = batch.response_BT != model.pad
    return [torch.stack([branch[b, real[b]] for branch in branches]) for b in range(len(real))]


@pytest.mark.parametrize("preset", LIVE)
def test_live_parameters(preset):
    with torch.device("meta"):
        model = ARPlus(PRESETS[preset].model, VocabularySizes())
    split = live_parameters(model)
    assert sum(split.values()) == LIVE[preset] == sum(p.numel() for p in model.parameters())


def test_live_parameters_by_component():
    with torch.device("meta"):
        model = ARPlus(PRESETS["arplus"].model, VocabularySizes())
    assert live_parameters(model) == {
        "character table": 1_899_600,
        "projections": 3 * 102_912,
        "persona table": 2_002_200,
        "memory": 20_502_528,
        "attention": 1_050_624,
        "feed-forward": 514_760,
        "norms and gates": 1_025,
        "generator": 4_862_976,
    }


@pytest.mark.parametrize(("preset", "expected"), [("ar", 10.3e9), ("arplus", 5.0e9)])
def test_flops_are_those_of_the_best_algorithm(preset, expected):
    flops = forward_backward_flops(PRESETS[preset].model, VocabularySizes())
    assert flops == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("preset", sorted(PAPER_ROWS))
def test_flops_agree_with_torchs_counter(preset):
    from torch.utils.flop_counter import FlopCounterMode

    model = make_model(small(preset)).train()
    batch = trimmed(model, rows(make_batch(model.config), slice(0, 1)))
    S, K = batch.context_BS.shape[1], batch.target_persona_BK.shape[1]
    targets = batch.response_BT.shape[1] - 1
    if batch.infilled_BU is not None:
        batch = dataclasses.replace(batch, infilled_BU=batch.response_BT[:, :-1])
    with FlopCounterMode(display=False) as counter:
        total = model(batch)
        (total.sum_dialogue + total.sum_auxiliary).backward()
    computed = forward_backward_flops(model.config, SIZES, context=S, targets=targets, persona=K)
    assert computed == pytest.approx(counter.get_total_flops(), rel=0.15)


@torch.no_grad()
def test_training_computes_what_evaluation_does(config):
    """There is no dropout here; what evaluation computes in fewer products must be the same."""
    model = make_model(config)
    batch = make_batch(config)
    torch.testing.assert_close(tuple(model.train()(batch)), tuple(model.eval()(batch)), atol=1e-3, rtol=1e-5)


@torch.no_grad()
def test_a_folded_model_computes_the_same_and_follows_its_weights(config):
    model = make_model(config)
    batch = make_batch(config)
    for _ in range(2):
        folded = model.folded()
        torch.testing.assert_close(tuple(folded(batch)), tuple(model(batch)), atol=1e-3, rtol=1e-5)
        assert (len(folded.layers[0].feed_forward) < len(model.layers[0].feed_forward)) == bool(config.ff_bottleneck)
        assert folded.generator.weight is model.generator.weight
        for parameter in model.parameters():
            parameter.mul_(1.1)


@torch.no_grad()
def test_logits_do_not_depend_on_batch_mates_or_padding(config):
    model = make_model(config).double()  # what remains is the order of sums
    batch = make_batch(config)
    together = all_logits(model, batch)
    for b, expected in enumerate(together):
        alone = all_logits(model, trimmed(model, rows(batch, slice(b, b + 1))))[0]
        torch.testing.assert_close(alone, expected, atol=1e-9, rtol=1e-9)
    backwards = all_logits(model, rows(batch, torch.arange(len(together)).flip(0)))[::-1]
    for one, other in zip(together, backwards, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_an_example_depends_on_all_its_parts(config):
    """Guards the tests above: a model that ignores an input would pass them."""
    model = make_model(config)
    batch = make_batch(config)
    before = model(batch)
    other = make_batch(config, seed=2)
    dialogue = {"context_BS", "context_profile_BS", "profiles_BPW", "target_persona_BK"}
    for name in dialogue | ({"infilled_BU"} if batch.infilled_BU is not None else set()):
        changed = {name: getattr(other, name)}
        if name == "context_BS":  # the profiles belong to the positions
            changed["context_profile_BS"] = torch.where(other.context_BS != model.pad, batch.context_profile_BS, 0)
        if name == "context_profile_BS":
            changed[name] = torch.where(batch.context_BS != model.pad, 2 - batch.context_profile_BS, 0)
        after = model(dataclasses.replace(batch, **changed))
        assert (after.sum_dialogue != before.sum_dialogue) == (name in dialogue), name
        assert (after.sum_auxiliary != before.sum_auxiliary) == (name not in dialogue), name


def unknown_personas(config, batch: Batch) -> Batch:
    personas = special_ids(SIZES.persona_words if config.memory_hops else SIZES.characters)
    one = torch.full_like(batch.target_persona_BK[:, :1], personas.unk)
    return dataclasses.replace(
        batch, target_persona_BK=one, profiles_BPW=torch.full_like(batch.profiles_BPW[:, :1, :1], personas.unk),
        context_profile_BS=torch.zeros_like(batch.context_profile_BS),
    )  # fmt: skip


def no_personas(config, batch: Batch) -> Batch:
    personas = special_ids(SIZES.persona_words if config.memory_hops else SIZES.characters)
    return dataclasses.replace(
        batch,
        target_persona_BK=torch.full_like(batch.target_persona_BK, personas.pad),
        profiles_BPW=torch.full_like(batch.profiles_BPW, personas.pad),
    )


def nothing_counted(config, batch: Batch) -> Batch:
    return dataclasses.replace(batch, counted_B=torch.zeros_like(batch.counted_B))


@pytest.mark.parametrize("change", [unknown_personas, no_personas, nothing_counted], ids=lambda f: f.__name__)
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch(config, change):
    model = make_model(config).train()
    losses = model(change(config, make_batch(config)))
    (losses.sum_dialogue + losses.sum_auxiliary).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_the_usual_batch_moves_every_parameter(config):
    """No dead parameters: each tensor's gradient has a non-zero entry."""
    model = make_model(config)
    losses = model(make_batch(config))
    (losses.sum_dialogue + losses.sum_auxiliary).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("preset", ["arplus", "no-memn2n", "no-rezero"])
@torch.no_grad()
def test_shared_layers_are_applied_in_order_and_then_again(preset):
    """Four layers in two groups are 0, 1, 0, 1: the same as four layers of their own with those weights."""
    shared = make_model(small(preset))
    copied = ARPlus(dataclasses.replace(shared.config, repeats=1), SIZES).eval()
    state = shared.state_dict()
    for name, value in list(state.items()):
        if name.startswith("layers."):
            _, i, rest = name.split(".", 2)
            state[f"layers.{int(i) + 2}.{rest}"] = value
    copied.load_state_dict(state)
    batch = make_batch(shared.config)
    for one, other in zip(copied(batch), shared(batch), strict=True):
        torch.testing.assert_close(one, other)
    greedy = Sampling(temperature=0, max_characters=15)
    torch.testing.assert_close(generate(copied, batch, greedy), generate(shared, batch, greedy))


@torch.no_grad()
def test_a_persona_without_words_adds_nothing(config):
    model = make_model(config)
    batch = no_personas(config, make_batch(config))
    if config.memory_hops:
        query = torch.randn(5, 7, config.d_model)
        words = batch.target_persona_BK
        o = model.memory(words, words != model.persona_pad, query, torch.tensor([0, 1, 3, 7, 7]))
        assert o.abs().max() == 0
    longer = torch.cat([batch.target_persona_BK, batch.target_persona_BK], 1)
    for one, other in zip(
        all_logits(model, batch), all_logits(model, dataclasses.replace(batch, target_persona_BK=longer)), strict=True
    ):
        assert one.isfinite().all()
        torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-5)


def test_uncounted_rows_enter_no_sum(config):
    model = make_model(config)
    batch = make_batch(config)
    counted = torch.tensor([True, False, True, True, False])
    part = model(dataclasses.replace(batch, counted_B=counted))
    alone = model(rows(batch, counted))
    for one, other in zip(part, alone, strict=True):
        torch.testing.assert_close(one, other)
    assert int(part.count_dialogue) == int(((batch.response_BT[:, 1:] != model.pad) & counted[:, None]).sum())
    assert part.count_dialogue < model(batch).count_dialogue


def test_int32_and_int64_ids_agree(config):
    model = make_model(config)
    for one, other in zip(
        model(make_batch(config)), model(make_batch(config, dtype=torch.int64)), strict=True
    ):  # fmt: skip
        assert one == other


def test_bf16_autocast(config):
    model = make_model(config).train()
    batch = make_batch(config)
    exact = model(batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = model(batch)
    (rough.sum_dialogue + rough.sum_auxiliary).backward()
    assert all(value.dtype == torch.float32 for value in rough)
    torch.testing.assert_close(rough.sum_dialogue, exact.sum_dialogue, rtol=0.03, atol=0)
    torch.testing.assert_close(rough.sum_auxiliary, exact.sum_auxiliary, rtol=0.03, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_tied_head():
    model = make_model(small("ar"))
    assert model.generator.weight is model.characters.weight
    names = {name for name, _ in model.named_parameters()}
    assert "characters.weight" in names
    assert "generator.weight" not in names
    again = ARPlus(model.config, SIZES)
    again.load_state_dict(model.state_dict())
    assert again.generator.weight is again.characters.weight
    batch = make_batch(model.config)
    assert again.eval()(batch).sum_dialogue == model(batch).sum_dialogue


def test_initial_weights():
    """Xavier bounds, attention as torch's MultiheadAttention, gates at zero; the same seed gives the same weights."""
    config = small("arplus")
    torch.manual_seed(3)
    model = ARPlus(config, SIZES)
    torch.manual_seed(3)
    again = ARPlus(config, SIZES)
    assert all(a.equal(b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    bound = (6 / (SIZES.characters + config.embedding_size)) ** 0.5
    assert 0.9 * bound < model.characters.weight.abs().max() <= bound
    attention = model.layers[0].attention
    assert isinstance(attention, Attention)
    bound = (6 / (4 * config.d_model)) ** 0.5
    assert 0.9 * bound < attention.query_key_value.weight.abs().max() <= bound
    assert not attention.query_key_value.bias.any()
    assert not attention.output.bias.any()
    assert model.layers[0].gate.r.item() == 0
    assert model.layers[0].feed_forward[0].bias.any()


def test_dropout_is_on_in_training_alone(config):
    model = make_model(dataclasses.replace(config, dropout=0.3))
    batch = make_batch(config)
    assert model(batch).sum_dialogue == model(batch).sum_dialogue
    model.train()
    assert model(batch).sum_dialogue != model(batch).sum_dialogue


@pytest.mark.parametrize("preset", ["arplus", "ar", "no-rezero"])
def test_compiled_layers_compute_the_same(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Inductor, whose compiler takes minutes: Dynamo and autograd's tracer, and no break in a graph."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager", fullgraph=True))
    config = small(preset)
    model, batch = make_model(config).double().train(), make_batch(config)

    def losses_and_gradients() -> list[torch.Tensor]:
        model.zero_grad()
        losses = model(batch)
        (losses.sum_dialogue + losses.sum_auxiliary).backward()
        return [losses.sum_dialogue.detach(), *(p.grad.clone() for p in model.parameters())]

    eager = losses_and_gradients()
    graphs = counters["stats"]["unique_graphs"]
    model.compile_layers()
    for compiled, expected in zip(losses_and_gradients(), eager, strict=True):
        torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-7)  # nats are fp32
    made = counters["stats"]["unique_graphs"] - graphs
    assert made == 4  # context and infilled response, the decoder on either; unique layers have them in common
    losses_and_gradients()
    assert counters["stats"]["unique_graphs"] - graphs == made


def test_a_batch_without_counted_rows_has_no_loss_and_no_target() -> None:
    model, batch = make_model(small("arplus")), make_batch(small("arplus"))
    found = model(dataclasses.replace(batch, counted_B=torch.zeros_like(batch.counted_B)))
    assert found.sum_dialogue == found.count_dialogue == found.sum_auxiliary == found.count_auxiliary == 0
    found.sum_dialogue.backward()
