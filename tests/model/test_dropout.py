"""Dropout: right in distribution, scaled, reproducible, the same elements in the backward pass."""

import pytest
import torch

from arplus.model.dropout import Dropout, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    x = torch.ones(3, 500, 401, dtype=dtype)
    y = dropout(x, p, training=True)
    assert y.dtype == dtype
    n = x.numel()
    assert (y == 0).sum().item() == pytest.approx(n * p, abs=5 * (n * p * (1 - p)) ** 0.5)
    assert y[y != 0].unique().item() == pytest.approx(1 / (1 - p), rel=1e-2 if dtype == torch.bfloat16 else 1e-4)


def test_elements_are_independent():
    """Neighbours share a random word of 64 bits; they must not share their fate."""
    torch.manual_seed(1)
    kept = (dropout(torch.ones(400_000), 0.5, training=True) != 0).float()
    for distance in (1, 2, 3, 4, 8):
        together = (kept[distance:] * kept[:-distance]).mean().item()
        assert together == pytest.approx(0.25, abs=0.005)


def test_the_gradient_is_that_of_the_same_elements():
    x = torch.randn(7, 31, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    weight = torch.randn(7, 31)
    y.backward(weight)
    scale = torch.where(y != 0, 65_536 / (65_536 - round(0.3 * 65_536)), 0.0)
    torch.testing.assert_close(x.grad, weight * scale)
    torch.testing.assert_close(y.detach(), x.detach() * scale)


def test_a_seed_gives_the_same_elements_again():
    x = torch.ones(1001)
    torch.manual_seed(5)
    first, second = dropout(x, 0.1, training=True), dropout(x, 0.1, training=True)
    torch.manual_seed(5)
    assert dropout(x, 0.1, training=True).equal(first)
    assert not first.equal(second)


def test_it_is_off_in_evaluation():
    x = torch.randn(5, 5)
    assert Dropout(0.5).eval()(x) is x
    assert Dropout(0.0).train()(x) is x
