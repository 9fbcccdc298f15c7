"""The wide feed-forward counted from what is dropped, against a mask and torch's autograd; what it keeps."""

import pytest
import torch
from torch.nn import functional

from arplus.model import feed_forward
from arplus.model.dropout import draw_dropped
from arplus.model.feed_forward import Wide

R, FF, P = 6, 40, 0.25


@pytest.fixture(autouse=True)
def however_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small sizes go the way of large ones, and so do high rates."""
    monkeypatch.setattr(feed_forward, "_LEAST", 0)
    monkeypatch.setattr(feed_forward, "_MOST", 1.0)


@pytest.mark.parametrize("p", [P, 1e-4, 0.999])
def test_value_and_gradients(p: float) -> None:
    """Also where nothing is dropped, or nearly all."""
    torch.manual_seed(0)
    wide = Wide(R, FF, p).train()
    x = torch.randn(2, 5, R, requires_grad=True)
    gradient = torch.randn(2, 5, R)
    inputs = (x, *wide.parameters())
    torch.manual_seed(1)
    ours = wide(x)
    found = torch.autograd.grad(ours, inputs, gradient)

    torch.manual_seed(1)
    kept = torch.ones(2, 5, FF)
    kept.view(-1)[draw_dropped(10 * FF, p)] = 0
    assert (kept == 0).any() == (p > 1e-4)
    expanded = functional.linear(x, wide.expand_weight, wide.expand_bias) * kept / (1 - p)
    theirs = functional.linear(expanded, wide.contract_weight, wide.contract_bias)
    expected = torch.autograd.grad(theirs, inputs, gradient)
    # What is left is a difference, with the rounding of the whole.
    atol = 1e-6 / (1 - p)
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=1e-5)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=10 * atol, rtol=1e-5)


@pytest.mark.parametrize("least", [0, 1 << 60])
def test_the_expectation_is_that_of_no_dropout(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either way, sums over rows or a mask."""
    monkeypatch.setattr(feed_forward, "_LEAST", least)
    torch.manual_seed(0)
    wide, x = Wide(R, FF, P), torch.randn(1, R)
    dropped = wide.train()(x.expand(100_000, R))
    error = dropped.std(0) / 100_000**0.5
    assert error.min() > 1e-5
    assert ((dropped.mean(0) - wide.eval()(x)[0]).abs() < 5 * error).all()


def test_evaluation_drops_nothing() -> None:
    wide, x = Wide(R, FF, P).eval(), torch.randn(3, R)
    expanded = functional.linear(x, wide.expand_weight, wide.expand_bias)
    expected = functional.linear(expanded, wide.contract_weight, wide.contract_bias)
    torch.testing.assert_close(wide(x), expected)


def test_autocast_computes_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products there, whatever the size."""
    torch.manual_seed(0)
    wide, x = Wide(R, FF, P).train(), torch.randn(50, R, requires_grad=True)
    torch.manual_seed(1)
    with monkeypatch.context() as patch:
        patch.setattr(feed_forward, "_LEAST", 1 << 60)
        exact = wide(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = wide(x)
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.03)
    rounded.float().sum().backward()
    assert {p.grad.dtype for p in (x, *wide.parameters()) if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in (x, *wide.parameters()))


def test_nothing_wide_is_kept() -> None:
    """Twelve bytes for each dropped element, where a mask and floats would be five for each of all; no weight twice."""
    R, FF, N = 30, 400, 100
    kept: list[torch.Tensor] = []
    wide, x = Wide(R, FF, 0.1).train(), torch.randn(N, R, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        wide(x)
    own = {p.data_ptr() for p in wide.parameters()}
    assert 0 < max(t.nbytes for t in kept if t.data_ptr() not in own) < N * FF
