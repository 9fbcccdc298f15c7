"""Attention against torch.nn.MultiheadAttention, one call a route as the paper's code makes them."""

import pytest
import torch

from arplus.model.attention import Attention

D, HEADS = 16, 4


def pair() -> tuple[Attention, torch.nn.MultiheadAttention]:
    torch.manual_seed(0)
    ours, theirs = Attention(D, HEADS, 0.0).eval(), torch.nn.MultiheadAttention(D, HEADS, batch_first=True).eval()
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.normal_()
        theirs.in_proj_weight.copy_(ours.query_key_value.weight)
        theirs.in_proj_bias.copy_(ours.query_key_value.bias)
    theirs.out_proj = ours.output
    return ours, theirs


def reals(*lengths: int) -> torch.Tensor:
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


@torch.no_grad()
def test_encoder_self_attention():
    ours, theirs = pair()
    x, real = torch.randn(2, 7, D), reals(7, 4)
    expected = theirs(x, x, x, key_padding_mask=~real, need_weights=False)[0]
    torch.testing.assert_close(ours(x, real)[real], expected[real])


@pytest.mark.parametrize("memories", [0, 1, 2])
@torch.no_grad()
def test_merged_routes_are_the_sum_of_single_calls(memories):
    """O_merge (Eq. 2), each route with its own bias, and O_T + O_C alone for Eq. 5."""
    ours, theirs = pair()
    x = torch.randn(2, 5, D)
    attended = [(torch.randn(2, 6, D), reals(6, 3)), (torch.randn(2, 4, D), reals(1, 4))][:memories]
    causal = torch.ones(5, 5).triu(1).bool()
    own = theirs(x, x, x, attn_mask=causal, need_weights=False)[0]
    others = [theirs(x, m, m, key_padding_mask=~real, need_weights=False)[0] for m, real in attended]
    routes = ours.routes(x, [ours.memory(m, real) for m, real in attended])
    merged = ours.output(routes.merged_BTD, 1 + memories)
    torch.testing.assert_close(merged, own + sum(others), atol=1e-4, rtol=1e-4)
    if not memories:
        assert routes.memories_BTD is None
    else:
        alone = ours.output(routes.memories_BTD, memories)
        torch.testing.assert_close(alone, torch.stack(others).sum(0), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("laid_out", [False, True])
@torch.no_grad()
def test_one_query_at_a_time_finds_what_all_at_once_do(laid_out):
    ours, _ = pair()
    x, m, real = torch.randn(3, 5, D), torch.randn(3, 6, D), reals(6, 3, 0)
    memory = ours.memory(m, real)
    together = ours.routes(x, [memory]).memories_BTD
    memory = memory.for_steps() if laid_out else memory
    alone = [ours.routes(x[:, t : t + 1], [memory]).memories_BTD for t in range(5)]
    torch.testing.assert_close(torch.cat(alone, 1), together)
    assert not together[2].any()


@torch.no_grad()
def test_a_sequence_of_padding_alone_gives_zeros():
    ours, _ = pair()
    m, real = torch.randn(2, 3, D), torch.tensor([[False] * 3, [True] * 3])
    heads = ours.routes(torch.randn(2, 5, D), [ours.memory(m, real)]).memories_BTD
    assert heads[0].abs().max() == 0
    assert heads[1].abs().min() > 0
