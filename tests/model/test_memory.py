"""The persona memory and the embeddings against their formulas, written out in loops."""

import dataclasses
import itertools
import math

import pytest
import torch
from helpers.small_models import make_batch, make_model, parts, small

from arplus.model.batch import Packed, Sequences
from arplus.model.embedding import SequenceInput, sinusoid


@pytest.mark.parametrize("tying", ["adjacent", "layer-wise"])
@torch.no_grad()
def test_memory_follows_the_formulas_hop_by_hop(tying):
    """For contexts with no query token, one, two and nine, and personas of none to three words."""
    config = dataclasses.replace(small("arplus"), memory_tying=tying)
    memory = make_model(config).memory.double()
    tables = [table.weight for table in memory.tables]
    hops, query_map = list(itertools.pairwise(tables)), torch.eye(config.d_model, dtype=torch.float64)
    if tying == "layer-wise":
        hops, query_map = [tables] * 3, memory.query_map.weight
    cases = list(itertools.product([0, 1, 2, 9], [[3, 9, 4], [7], [], [5, 5]]))
    contexts = Sequences.of(torch.tensor([J + 1 for J, _ in cases]), [3, 13])
    query_ND = torch.randn(int(contexts.offsets[-1]), config.d_model, dtype=torch.float64)
    found = memory(Packed.of([words for _, words in cases]), query_ND, contexts)

    d = config.d_model
    for (J, words), context, got in zip(cases, parts(query_ND, contexts), found, strict=True):
        q = context[:J].clone()
        o = torch.zeros(d, dtype=torch.float64)
        for a, c in hops:
            u = torch.zeros(d, dtype=torch.float64)
            for j in range(1, J + 1):
                l_j = torch.tensor([(1 - j / J) - (k / d) * (1 - 2 * j / J) for k in range(1, d + 1)])
                u += l_j * q[j - 1]
            if words:
                p = torch.stack([a[w] @ u for w in words]).softmax(0)
                o = sum(p_i * c[w] for p_i, w in zip(p, words, strict=True))
            q = q @ query_map.T + o
        torch.testing.assert_close(got, o, atol=1e-5, rtol=1e-4)


def test_sinusoid_interleaves():
    table = sinusoid(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoid(4, 5).shape == (4, 5)


@pytest.mark.parametrize("preset", ["arplus", "ar"], ids=["projected", "as wide"])
@pytest.mark.parametrize("start", [0, 7])
@torch.no_grad()
def test_each_token_gets_the_position_in_its_sequence(preset, start):
    config = small(preset)
    E = config.embedding_size
    layer, of = SequenceInput(config).eval(), Sequences.of(torch.tensor([3, 0, 2]), [2, 1])
    vectors_NE, added_NE = torch.randn(2, 5, E)
    x_NE = vectors_NE * E**0.5 + added_NE + sinusoid(20, E)[[start, start + 1, start + 2, start, start + 1]]
    torch.testing.assert_close(layer(vectors_NE, of, added_NE, start=start), layer.projection(x_NE))
    assert (config.d_model == E) == isinstance(layer.projection, torch.nn.Identity)


@torch.no_grad()
def test_a_set_has_no_positions():
    config = small("ar")
    of = Sequences.of(torch.tensor([3]))
    same_NE = torch.randn(config.embedding_size).expand(3, -1)
    a, b, c = SequenceInput(config, positions=False).eval()(same_NE, of)
    assert a.equal(b)
    assert a.equal(c)


@torch.no_grad()
def test_each_context_token_gets_the_sum_of_its_speakers_words(config):
    model, batch = make_model(config), make_batch(config)
    given = []
    model.context_input.register_forward_pre_hook(lambda _, inputs: given.append(inputs))
    model.encode(batch)
    [(_, of, added_NE)] = given
    assert of is batch.context.sequences
    table = (model.persona_words if config.memory_hops else model.characters).weight
    profiles = [table[words].sum(0) for words in parts(*batch.profiles)]
    torch.testing.assert_close(added_NE, torch.stack([profiles[i] for i in batch.speaker_N]))
