"""Dropout: right in distribution, scaled, reproducible, the same elements in the backward pass."""

import pytest
import torch

from arplus.model.dropout import Dropout, draw_dropped, dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.003])
def test_share_and_scale(p, dtype):
    torch.manual_seed(0)
    y = dropout(torch.ones(3, 500, 401, dtype=dtype), p, training=True)
    assert y.dtype == dtype
    assert (y == 0).sum().item() == pytest.approx(y.numel() * p, abs=5 * (y.numel() * p * (1 - p)) ** 0.5)
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype))


def test_bf16_does_not_round_the_scale():
    """A factor of 1.108 or 1.113, rounded by itself, would be 1.109 and shift every mean."""
    torch.manual_seed(0)
    x = torch.linspace(1, 2, 100_000, dtype=torch.bfloat16)
    y = dropout(x, 0.1, training=True)
    of_kept = y[y != 0].double().sum() / x[y != 0].double().sum()
    assert of_kept.item() == pytest.approx(1 / 0.9, rel=5e-4)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_any_layout(layout):
    x = {
        "contiguous": torch.ones(30, 40),
        "transposed": torch.ones(40, 30).t(),
        "expanded": torch.ones(40).expand(30, 40),
    }
    torch.manual_seed(3)
    y = dropout(x[layout], 0.5, training=True)
    torch.manual_seed(3)
    assert y.equal(dropout(torch.ones(30, 40), 0.5, training=True))
    assert x[layout].eq(1).all()


def test_the_gradient_is_that_of_the_same_elements():
    x = torch.randn(7, 31, requires_grad=True)
    y = dropout(x, 0.3, training=True)
    weight = torch.randn(7, 31)
    y.backward(weight)
    scale = torch.where(y != 0, (y / x).max().item(), 0.0)
    torch.testing.assert_close(x.grad, weight * scale)
    torch.testing.assert_close(y.detach(), x.detach() * scale)


def test_nothing_and_next_to_nothing_can_be_dropped():
    assert dropout(torch.ones(0, 5), 0.1, training=True).shape == (0, 5)
    torch.manual_seed(0)
    x = torch.ones(1000)
    assert all(dropout(x, 1e-9, training=True).equal(x) for _ in range(50))


def test_more_elements_than_places_are_refused():
    with pytest.raises(ValueError, match="lower --batch-size"):
        draw_dropped(1 << 30, 0.1)


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


@pytest.mark.parametrize("p", [0.1, 0.5, 0.003, 0.999])
def test_dropped_places_are_ascending_and_their_share_is_p(p):
    torch.manual_seed(0)
    n = 400_000
    places = draw_dropped(n, p)
    assert places.dtype == torch.int32
    assert (places.diff() > 0).all()
    assert places[0] >= 0
    assert places[-1] < n
    assert len(places) == pytest.approx(n * p, abs=5 * (n * p * (1 - p)) ** 0.5)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_dropped_places_are_independent(p):
    torch.manual_seed(1)
    dropped = torch.zeros(400_000)
    dropped[draw_dropped(400_000, p)] = 1
    for distance in (1, 2, 3, 10):
        together = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert together == pytest.approx(p * p, abs=0.005)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_every_place_is_dropped_as_often(p):
    """The first and the last too; over many short draws, some of which run out of gaps and draw more."""
    torch.manual_seed(2)
    count = torch.zeros(12)
    for _ in range(4_000):
        count[draw_dropped(12, p)] += 1
    assert (count - 4_000 * p).abs().max() < 5 * (4_000 * p * (1 - p)) ** 0.5
