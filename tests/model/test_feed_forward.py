"""The chunked wide feed-forward against the same mask and torch's autograd; what it keeps."""

import pytest
import torch
from torch.nn import functional

from arplus.model import feed_forward
from arplus.model.dropout import draw_kept, draw_levels, scale_of
from arplus.model.feed_forward import Wide

R, FF, P = 6, 40, 0.25


def test_value_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over several chunks, the last one shorter."""
    monkeypatch.setattr(feed_forward, "_CHUNK", 4)
    torch.manual_seed(0)
    wide = Wide(R, FF, P).train()
    x = torch.randn(2, 5, R, requires_grad=True)
    gradient = torch.randn(2, 5, R)
    inputs = (x, *wide.parameters())
    torch.manual_seed(1)
    ours = wide(x)
    found = torch.autograd.grad(ours, inputs, gradient)

    torch.manual_seed(1)
    levels = draw_levels(P)
    kept = torch.cat([draw_kept(torch.Size([n, FF]), levels) for n in (4, 4, 2)]).view(2, 5, FF)
    assert kept.min() == 0
    expanded = functional.linear(x, wide.expand_weight, wide.expand_bias) * kept * scale_of(levels)
    theirs = functional.linear(expanded, wide.contract_weight, wide.contract_bias)
    expected = torch.autograd.grad(theirs, inputs, gradient)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_evaluation_drops_nothing() -> None:
    wide, x = Wide(R, FF, P).eval(), torch.randn(3, R)
    expanded = functional.linear(x, wide.expand_weight, wide.expand_bias)
    expected = functional.linear(expanded, wide.contract_weight, wide.contract_bias)
    torch.testing.assert_close(wide(x), expected)


def test_autocast_computes_in_bf16() -> None:
    torch.manual_seed(0)
    wide, x = Wide(R, FF, P).train(), torch.randn(50, R, requires_grad=True)
    torch.manual_seed(1)
    exact = wide(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = wide(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)
    rounded.float().sum().backward()
    assert {p.grad.dtype for p in (x, *wide.parameters()) if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in (x, *wide.parameters()))


def test_it_keeps_a_byte_an_element() -> None:
    kept: list[int] = []
    wide, x = Wide(R, FF, P).train(), torch.randn(100, R, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        wide(x)
    assert max(kept) == 100 * FF
