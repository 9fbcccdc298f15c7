"""Replies: the sampler in distribution, cached decoding, stopping, reproducibility."""

import dataclasses

import pytest
import torch
from helpers.small_models import SIZES, make_batch, make_model, parts, small, take

from arplus.config import Sampling, from_dict, special_ids, validate
from arplus.errors import UsageError
from arplus.model.batch import Packed, Sequences
from arplus.model.generate import draw, generate, top_probabilities

IDS = special_ids(SIZES.characters)
GREEDY = Sampling(temperature=0, max_characters=15)
PAPERS = Sampling(max_characters=15)


@pytest.mark.parametrize(
    "settings",
    [
        Sampling(),
        Sampling(temperature=1, top_p=0),
        Sampling(temperature=1.5, top_k=4, top_p=0.8),
        Sampling(temperature=1, top_p=0.4),
    ],
    ids=["paper", "plain", "top-k", "small nucleus"],
)
@pytest.mark.parametrize("draws", [2, 4])
def test_drawn_ids_follow_the_filtered_distribution(settings, draws):
    """Against torch's own softmax on a distribution filtered by hand."""
    logits = torch.tensor([2.0, -1.0, 1.5, 0.3, 0.0, 1.9, -3.0, 0.8])
    scaled = (logits / settings.temperature).tolist()
    order = sorted(range(len(scaled)), key=lambda i: -scaled[i])[: settings.top_k or None]
    p = torch.tensor([scaled[i] for i in order]).softmax(0).tolist()
    kept, mass = [], 0.0
    for i, p_i in zip(order, p, strict=True):
        if kept and settings.top_p and mass > settings.top_p:
            break
        kept.append(i)
        mass += p_i
    expected = torch.zeros(len(scaled))
    expected[kept] = torch.tensor([scaled[i] for i in kept]).softmax(0)

    n = 200_000
    uniform = torch.rand(n, draws, generator=torch.Generator().manual_seed(0))
    drawn = draw(logits.expand(n, -1), uniform, settings)
    observed = torch.bincount(drawn, minlength=len(scaled)) / n
    assert (observed[expected == 0] == 0).all()
    deviation = (expected * (1 - expected) / n).sqrt()
    assert ((observed - expected).abs() <= 5 * deviation).all()


def test_draw_at_the_ends_never_takes_an_impossible_id():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(2, -1)
    ends = torch.tensor([[0.0, 0.5], [1 - 2**-24, 0.5]])
    assert draw(logits, ends, Sampling(temperature=1, top_p=0)).tolist() == [1, 3]


def test_a_tiny_temperature_takes_the_best_id():
    logits = torch.tensor([[3.0, 5.0, -torch.inf]])
    assert draw(logits, torch.tensor([[0.999, 0.5]]), Sampling(temperature=1e-38)).tolist() == [1]


def test_filtering_keeps_at_least_the_best_id():
    logits = torch.randn(4, 30)
    kept = top_probabilities(logits, top_k=0, top_p=1e-9) > 0
    assert kept.sum(-1).tolist() == [1] * 4
    assert kept.int().argmax(-1).equal(logits.argmax(-1))


@pytest.mark.parametrize("spread", [0.01, 0.4, 4, 40])
@pytest.mark.parametrize("top_p", [0.05, 0.9, 1.0])
def test_nucleus_against_a_sort(spread, top_p):
    """From flat to peaked, with ids of probability zero, each row by itself, up to what rounding decides."""
    p = (spread * torch.randn(9, 3000, generator=torch.Generator().manual_seed(0))).softmax(-1)
    p[4, :2000] = 0
    p = p / p.sum(-1, keepdim=True)
    kept = top_probabilities(p.log(), top_p=top_p)
    descending = p.double().sort(descending=True)
    before = descending.values.cumsum(-1) - descending.values
    for eps, at_least in ((-1e-5, True), (1e-5, False)):
        bound = torch.zeros_like(p, dtype=torch.bool).scatter(-1, descending.indices, before <= top_p + eps)
        larger, smaller = (kept > 0, bound & (p > 0)) if at_least else (bound, kept > 0)
        assert (larger | ~smaller).all()
    torch.testing.assert_close(kept[kept > 0], p[kept > 0], atol=0, rtol=1e-4)


def test_ids_as_likely_as_the_last_one_are_in_the_nucleus():
    flat = top_probabilities(torch.zeros(2, 700), top_p=0.5)
    assert (flat > 0).all()
    logits = torch.tensor([[3.0, 1, 2, 1, 1, -9, -torch.inf], [-torch.inf, 1, 2, 1, 1, -9, 3.0]])
    assert (top_probabilities(logits, top_p=0.8) > 0).tolist() == [
        [True] * 5 + [False] * 2,
        [False] + [True] * 4 + [False, True],
    ]


def characters(replies_BL: torch.Tensor) -> list[list[int]]:
    """The replies without padding."""
    return [[i for i in reply if i != IDS.pad] for reply in replies_BL.tolist()]


@pytest.mark.parametrize("blocks", [None, [2, 0, 3]])
@torch.no_grad()
def test_cached_decoding_equals_full_recomputation(config, blocks):
    model, batch = make_model(config).double(), take(make_batch(config), range(5), blocks)
    memories, cache = model.encode(batch), model.new_cache()
    full = parts(model.decode(batch.response, memories), batch.response.sequences)
    responses = parts(*batch.response)
    one_each = Sequences.of(torch.ones(5), blocks)
    for t in range(max(map(len, responses))):
        ids = torch.stack([ids[min(t, len(ids) - 1)] for ids in responses])
        step = model.decode(Packed(ids, one_each), memories, cache, start=t)
        for one, expected in zip(step, full, strict=True):
            if t < len(expected):
                torch.testing.assert_close(one, expected[t], atol=1e-9, rtol=1e-9)


@torch.no_grad()
def test_greedy_equals_argmax_by_full_recomputation(config):
    model, batch = make_model(config), make_batch(config)
    for i, found in enumerate(characters(generate(model, batch, GREEDY))):
        memories, reply = model.encode(take(batch, [i])), []
        while len(reply) < 15:
            logits = model.head(model.decode(Packed.of([[IDS.bos, *reply]]), memories)[-1])
            if not reply:
                logits[IDS.pad :] = -torch.inf
            if (best := int(logits.argmax())) >= IDS.pad:
                break
            reply.append(best)
        assert found == reply


@pytest.mark.parametrize("settings", [GREEDY, PAPERS], ids=["greedy", "sampled"])
def test_replies_are_the_same_in_any_blocks(config, settings):
    model, batch = make_model(config), make_batch(config)
    expected = generate(model, batch, settings, torch.Generator().manual_seed(5))
    for blocks in ([1, 4], [1, 1, 1, 1, 1], [0, 3, 2]):
        found = generate(model, take(batch, range(5), blocks), settings, torch.Generator().manual_seed(5))
        assert found.equal(expected)


def test_replies_do_not_read_the_response(config):
    """Nor the infilled response, nor the targets: there are none yet."""
    model, batch = make_model(config), make_batch(config)
    nothing = Packed.of([[]] * 5)
    without = dataclasses.replace(batch, response=nothing, target_N=nothing.ids, infilled=None)
    assert generate(model, without, GREEDY).equal(generate(model, batch, GREEDY))


def test_no_examples_have_no_replies(config):
    assert generate(make_model(config), take(make_batch(config), []), PAPERS).shape == (0, 0)


def test_seeded_replies_are_reproducible_and_independent_of_the_batch():
    config = small("arplus")
    model, batch = make_model(config), make_batch(config, examples=8)
    first, again, other = (generate(model, batch, PAPERS, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6))
    assert first.equal(again)
    assert first.shape != other.shape or not first.equal(other)
    half = generate(model, take(batch, range(4)), PAPERS, torch.Generator().manual_seed(5))
    assert characters(first)[:4] == characters(half)


def test_replies_under_bf16_autocast_are_mostly_those_of_fp32(config):
    model, batch = make_model(config), make_batch(config, examples=40)
    exact = characters(generate(model, batch, GREEDY))
    with torch.autocast("cpu", torch.bfloat16):
        rough = characters(generate(model, batch, GREEDY))
    assert sum(a[0] == b[0] for a, b in zip(exact, rough, strict=True)) >= 32


def test_lengths_and_special_tokens(config):
    """Replies hold ordinary characters only, from one to the longest allowed, then padding alone."""
    model = make_model(config)
    batch = make_batch(config, examples=24)
    hot = Sampling(temperature=50, top_p=0, max_characters=6)
    replies = generate(model, batch, hot, torch.Generator().manual_seed(0))
    ended = replies == IDS.pad
    assert ((replies < IDS.pad) | ended).all()
    assert not ended[:, 0].any(), "at least one character"
    assert replies.shape[1] <= 6
    assert (ended[:, 1:] >= ended[:, :-1]).all(), "nothing follows the end"
    assert ended.any(), "at this temperature some reply meets a special token"
    assert len(set(map(tuple, replies.tolist()))) > 1


def test_every_special_token_ends_a_reply():
    config = small("arplus")
    model = make_model(config)
    batch = make_batch(config, examples=2)
    for special in IDS:
        with torch.no_grad():
            model.head.weight.zero_()
            model.head.bias = torch.nn.Parameter(torch.zeros(SIZES.characters))
            model.head.bias[special] = 50.0
            model.head.bias[7] = 20.0
        assert generate(model, batch, PAPERS).tolist() == [[7], [7]]
        nothing = generate(model, batch, dataclasses.replace(PAPERS, min_characters=0))
        assert nothing.shape == (2, 0)


def test_each_character_is_drawn_by_itself():
    """Where all are as likely, one is that before it once in 51 times."""
    config = small("arplus")
    model = make_model(config)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias = torch.nn.Parameter(torch.zeros(SIZES.characters).index_fill_(0, torch.tensor(IDS), -1e9))
    settings = Sampling(temperature=1, top_p=0, max_characters=40)
    replies = generate(model, make_batch(config, examples=50), settings, torch.Generator().manual_seed(0))
    n, p = 50 * 39, 1 / 51
    again = int((replies[:, 1:] == replies[:, :-1]).sum())
    assert again == pytest.approx(n * p, abs=5 * (n * p * (1 - p)) ** 0.5)


def test_generation_leaves_the_model_in_its_mode_and_without_dropout():
    config = dataclasses.replace(small("arplus"), dropout=0.5)
    model = make_model(config).train()
    batch = make_batch(config)
    assert generate(model, batch, GREEDY).equal(generate(model, batch, GREEDY))
    assert model.training


def test_settings_out_of_range_are_named():
    wrong = {"temperature": -1, "top_p": 1.5, "top_k": -2, "max_characters": 0, "min_characters": -1}
    for name, value in wrong.items():
        with pytest.raises(UsageError, match=f"--{name.replace('_', '-')}: "):
            from_dict(Sampling, {name: value}, source="test")
    for right in (Sampling(), GREEDY):
        assert validate(right) == right
