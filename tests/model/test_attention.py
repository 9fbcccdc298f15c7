"""Attention against torch.nn.MultiheadAttention, one call per route and sequence as the paper's code makes them."""

import pytest
import torch
from helpers.small_models import parts
from torch import Tensor, nn

from arplus.model.attention import Attention
from arplus.model.batch import Sequences
from arplus.model.ops import Operations

D, HEADS = 16, 4
BLOCKS = pytest.mark.parametrize("blocks", [None, [1, 3], [2, 0, 2]])


class Pair:
    """Our attention and torch's with the same weights."""

    def __init__(self, p: float = 0.0) -> None:
        torch.manual_seed(0)
        self.ours = Attention(D, HEADS, p).eval()
        self.theirs = nn.MultiheadAttention(D, HEADS, batch_first=True).eval()
        for parameter in self.ours.parameters():
            parameter.data.normal_()
        self.theirs.in_proj_weight.data.copy_(self.ours.query_key_value.weight)
        self.theirs.in_proj_bias.data.copy_(self.ours.query_key_value.bias)
        self.theirs.out_proj = self.ours.output

    def look(self, x_TD: Tensor, to_SD: Tensor, mask: Tensor | None = None) -> Tensor:
        """What torch's finds in one sequence for another."""
        return self.theirs(x_TD[None], to_SD[None], to_SD[None], attn_mask=mask, need_weights=False)[0][0]


def sequences(lengths: list[int], blocks: list[int] | None = None) -> tuple[Tensor, Sequences]:
    """Random ones of these lengths."""
    return torch.randn(sum(lengths), D), Sequences.of(torch.tensor(lengths), blocks)


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


@BLOCKS
@torch.no_grad()
def test_encoder_self_attention(blocks):
    pair = Pair()
    x_ND, of = sequences([4, 0, 7, 1], blocks)
    found = parts(pair.ours(x_ND, of), of)
    assert found[1].shape == (0, D)
    close(found[:1] + found[2:], [pair.look(x, x) for x in parts(x_ND, of) if len(x)])


def test_torch_has_a_fused_kernel_for_every_mask():
    """Of three dimensions it would make plain products."""
    attention = Attention(D, HEADS, 0.0).eval()
    x_ND, of = sequences([3, 5])
    with torch.inference_mode(), torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        encoded_ND = attention(x_ND, of)
        attention.routes(x_ND, of, [attention.key_value(encoded_ND, of)])
    fused = [event.key for event in found.key_averages() if "attention" in event.key]
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in fused
    assert "aten::_scaled_dot_product_attention_math" not in fused


@pytest.mark.parametrize("memories", [0, 1, 2])
@BLOCKS
@torch.no_grad()
def test_each_route_is_a_call_of_its_own(memories, blocks):
    """O_prev, O_C and O_T, each with the output's bias."""
    pair = Pair()
    x_ND, of = sequences([5, 2, 1, 6], blocks)
    attended = [sequences([6, 3, 1, 2], blocks), sequences([1, 4, 2, 2], blocks)][:memories]
    routes = pair.ours.routes(x_ND, of, [pair.ours.key_value(*memory) for memory in attended])
    own = [pair.look(x, x, torch.ones(len(x), len(x)).triu(1).bool()) for x in parts(x_ND, of)]
    close(parts(routes.previous_ND, of), own)
    assert len(routes.memories) == memories
    for found, memory in zip(routes.memories, attended, strict=True):
        close(parts(found, of), [pair.look(x, m) for x, m in zip(parts(x_ND, of), parts(*memory), strict=True)])


@BLOCKS
@torch.no_grad()
def test_one_token_at_a_time_finds_what_all_at_once_do(blocks):
    ours = Pair().ours
    x_ND, of = sequences([5, 5, 5, 5], blocks)
    memory = ours.key_value(*sequences([6, 3, 0, 2], blocks))
    together = ours.routes(x_ND, of, [memory])
    one_each, past = Sequences.of(torch.ones(4), blocks), None
    for t in range(5):
        step = ours.routes(x_ND[t::5], one_each, [memory], past)
        past = step.own
        close([step.previous_ND, *step.memories], [together.previous_ND[t::5], together.memories[0][t::5]])


@BLOCKS
@torch.no_grad()
def test_an_empty_sequence_is_found_to_hold_zeros(blocks):
    """Of which nothing but the output's bias is left; there is never a query with nowhere to look."""
    ours = Pair().ours
    memory = ours.key_value(*sequences([0, 3, 0, 0], blocks))
    x_ND, of = sequences([5, 2, 1, 4], blocks)
    first, second, *others = parts(ours.routes(x_ND, of, [memory]).memories[0], of)
    for found in (first, *others):
        assert found.equal(ours.output.bias.expand_as(found))
    assert not second.allclose(ours.output.bias)
    assert all((mask == 0).any(-1).all() for _, _, mask in memory)


@pytest.mark.parametrize("training", [False, True])
def test_weights_are_dropped_in_training_alone(training):
    rates = []

    class Recorded(Operations):
        def attend(self, query, key, value, mask, p):
            rates.append(p)
            return super().attend(query, key, value, mask, p)

    ours = Pair(p=0.25).ours.train(training)
    ours.ops = Recorded()
    x_ND, of = sequences([3, 2])
    ours(x_ND, of)
    ours.routes(x_ND, of, [ours.key_value(x_ND, of)])
    assert rates == [0.25 if training else 0.0] * 3
