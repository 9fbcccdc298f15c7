"""The persona memory and the embeddings against their formulas, written out in loops."""

import itertools
import math

import pytest
import torch
from small_models import SIZES, small

from arplus.model.embedding import masked_sum, sinusoid, speaker_personas
from arplus.model.memory import PersonaMemory


@pytest.mark.parametrize("J", [0, 1, 2, 9])
@torch.no_grad()
def test_memory_follows_the_formulas_hop_by_hop(J):
    config = small("arplus")
    memory = PersonaMemory(config, SIZES).double()
    d = config.d_model
    words, real = torch.tensor([[3, 9, 4, 0, 0]]), torch.tensor([[True, True, True, False, False]])
    q_JD = torch.randn(9, d, dtype=torch.float64)
    got = memory(words, real, q_JD[None], torch.tensor([J]))[0]

    tables = [table.weight for table in memory.tables]
    q = q_JD[:J].clone()
    for a, c in itertools.pairwise(tables):
        u = torch.zeros(d, dtype=torch.float64)
        for j in range(1, J + 1):
            l_j = torch.tensor([(1 - j / J) - (k / d) * (1 - 2 * j / J) for k in range(1, d + 1)])
            u += l_j * q[j - 1]
        p = torch.stack([a[w] @ u for w in (3, 9, 4)]).softmax(0)
        o = sum(p_i * c[w] for p_i, w in zip(p, (3, 9, 4), strict=True))
        q = q + o
    torch.testing.assert_close(got, o, atol=1e-5, rtol=1e-4)


def test_sinusoid_interleaves_and_starts_anywhere():
    table = sinusoid(5, 6)
    for position in range(5):
        for i in range(3):
            angle = position / 10_000 ** (2 * i / 6)
            assert table[position, 2 * i].item() == pytest.approx(math.sin(angle), abs=1e-6)
            assert table[position, 2 * i + 1].item() == pytest.approx(math.cos(angle), abs=1e-6)
    assert sinusoid(2, 6, start=3).equal(table[3:])
    assert sinusoid(4, 5).shape == (4, 5)


def test_each_position_gets_the_sum_of_its_speakers_words():
    profiles_BPW = torch.tensor([[[1, 2, 0], [3, 0, 0]], [[4, 4, 4], [5, 6, 0]]])
    table = torch.arange(7.0)[:, None].repeat(1, 2)
    summed = masked_sum(table[profiles_BPW], profiles_BPW != 0)
    got = speaker_personas(summed, torch.tensor([[0, 1, 1], [1, 0, 0]], dtype=torch.int32))
    assert got[..., 0].tolist() == [[3, 3, 3], [11, 12, 12]]
