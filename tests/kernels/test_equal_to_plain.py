"""Every operation of every backend against the plain one in float64, values and gradients; dropout by its statistics.

A backend's kernels run here on the CPU, whatever device they are for, and once more on a GPU where there is one. What
drops is held to the plain operation with the elements that it dropped, which are read off a first call with the same
seed.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from arplus.kernels import BACKENDS, cpu
from arplus.model.ops import Operations

PLAIN = Operations()
Call = Callable[..., Tensor]


@pytest.fixture(params=["plain", *BACKENDS, pytest.param("plain on gpu", marks=pytest.mark.gpu)])
def ops(request, monkeypatch, gpu: torch.device) -> Iterator[Operations]:
    """The operations of a backend, with sizes at which small products go the way of large ones.

    All tensors are made on the device on which they run.
    """
    backend, _, on_gpu = request.param.partition(" on ")
    monkeypatch.setattr(cpu, "LEAST", 0)
    with torch.device(gpu if on_gpu else "cpu"):
        torch.manual_seed(0)
        yield BACKENDS.get(backend, Operations)()


def results(call: Call, inputs: list[Tensor]) -> list[Tensor]:
    """The value, and the gradient of each input where the value's is random."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    value = call(*leaves)
    g = torch.Generator().manual_seed(7)
    gradient = torch.randn(value.shape, generator=g, device="cpu").to(value)
    return [value.detach(), *torch.autograd.grad(value, leaves, gradient)]


def hold(ops: Operations, call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Holds ``call(ops, *inputs)`` in float64 and in fp32 to the plain operation in float64."""
    expected = results(lambda *x: call(PLAIN, *x), [x.double() for x in inputs])
    for dtype, tolerance in ((torch.float64, 1e-6), (torch.float32, 2e-5)):
        found = results(lambda *x: call(ops, *x), [x.to(dtype) for x in inputs])
        with torch.no_grad():
            found.append(call(ops, *(x.to(dtype) for x in inputs)))
        for a, b in zip(found, [*expected, expected[0]], strict=True):
            assert a.dtype == torch.float32 or dtype == torch.float64
            torch.testing.assert_close(a.double(), b.double(), atol=tolerance, rtol=tolerance)


def hold_bf16(ops: Operations, call: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Holds it under autocast to the plain operation in float64, and its types to the plain one's under autocast."""

    def under_autocast(of: Operations) -> list[Tensor]:
        def autocast(*x: Tensor) -> Tensor:
            with torch.autocast(x[0].device.type, torch.bfloat16):
                return call(of, *x)

        return results(autocast, list(inputs))

    expected = results(lambda *x: call(PLAIN, *x), [x.double() for x in inputs])
    for found, plain, exact in zip(under_autocast(ops), under_autocast(PLAIN), expected, strict=True):
        assert found.dtype == plain.dtype
        error = (found.double() - exact).norm() / exact.norm()
        assert error < 0.02, f"{error:.3f}"


# ------------------------------------------------------------------------------------------------------------- linear


def linear(of: Operations, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return of.linear(x, weight, bias)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (0, 12), (12,)])
def test_linear(ops: Operations, shape: tuple[int, ...], bias: bool) -> None:
    hold(ops, linear, torch.randn(shape), torch.randn(9, 12), *([torch.randn(9)] * bias))


@torch.no_grad()
def test_linear_of_any_strides(ops: Operations) -> None:
    x, weight, bias = torch.randn(12, 5, 7).permute(2, 1, 0), torch.randn(12, 9).t(), torch.randn(18)[::2]
    for part in (x, x[:, 2], x[::2]):
        torch.testing.assert_close(ops.linear(part, weight, bias), PLAIN.linear(part, weight, bias))


def test_linear_under_autocast(ops: Operations) -> None:
    hold_bf16(ops, linear, torch.randn(7, 12), torch.randn(9, 12), torch.randn(9))


# ------------------------------------------------------------------------------------------------------------- attend

MASKS = {
    "nothing": None,
    "padding": torch.where(torch.arange(7) < torch.tensor([7, 1, 4])[:, None, None, None], 0.0, -torch.inf),
    "future": torch.full((1, 1, 7, 7), -torch.inf).triu(1),
}


def routes(queries: int, batch: int = 3, width: int = 4) -> list[Tensor]:
    """Queries, keys and values of two heads for seven places, which do not lie whole."""
    return [torch.randn(batch, n, 2, width).transpose(1, 2) for n in (queries, 7, 7)]


@pytest.mark.parametrize(
    ("masked", "queries"), [("nothing", 5), ("nothing", 1), ("padding", 5), ("padding", 1), ("future", 7)]
)
def test_attend(ops: Operations, masked: str, queries: int) -> None:
    mask = MASKS[masked]

    def attend(of: Operations, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return of.attend(query, key, value, None if mask is None else mask.to(query), 0.0)

    hold(ops, attend, *routes(queries))
    found = [x.bfloat16() for x in routes(queries)]
    rough = attend(ops, *found)
    assert rough.dtype == torch.bfloat16
    torch.testing.assert_close(rough.double(), attend(PLAIN, *(x.double() for x in found)), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("queries", [1, 5])
def test_attend_of_no_sequences(ops: Operations, p: float, queries: int) -> None:
    found = results(lambda *x: ops.attend(*x, torch.zeros(0, 1, 1, 7), p), routes(queries, batch=0))
    assert [x.shape for x in found[:2]] == [(0, 2, queries, 4)] * 2


@pytest.mark.parametrize("masked", MASKS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_attend_with_dropout(ops: Operations, masked: str, dtype: torch.dtype) -> None:
    """Values of one seven-wide unit vector each show the weights, and so which of them were dropped."""
    p, mask = 0.25, MASKS[masked]
    inputs = [x.to(dtype) for x in routes(7, width=7)]
    mask = mask if mask is None else mask.to(inputs[0])
    query, key, _ = inputs
    units = torch.eye(7, dtype=dtype).expand(3, 2, 7, 7)
    torch.manual_seed(1)
    kept = (ops.attend(query, key, units, mask, p) != 0).double() / (1 - p)
    weights = PLAIN.attend(query, key, units, mask, 0.0)
    assert 0.05 < (kept == 0)[weights != 0].double().mean() < 0.5

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        score = query @ key.mT / math.sqrt(7) + (0 if mask is None else mask.double())
        return (score.softmax(-1) * kept) @ value

    def ours(*x: Tensor) -> Tensor:
        torch.manual_seed(1)
        return ops.attend(*x, mask, p)

    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 0.06}[dtype]
    for found, exact in zip(results(ours, inputs), results(plain, [x.double() for x in inputs]), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)


def test_attention_drops_in_expectation_nothing(ops: Operations) -> None:
    query, key, value = routes(7)
    many = [torch.cat([x[:1]] * 20_000) for x in (query, key, value)]
    mask = torch.full((1, 1, 7, 7), -torch.inf).triu(1)
    found = ops.attend(*many, mask, 0.25)
    expected = PLAIN.attend(query[:1], key[:1], value[:1], mask, 0.0)[0]
    assert ((found.mean(0) - expected).abs() < 5 * found.std(0) / len(found) ** 0.5).all()


# ------------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.003, 0.999])
def test_share_and_scale(ops: Operations, p: float, dtype: torch.dtype) -> None:
    y = ops.dropout(torch.ones(3, 500, 401, dtype=dtype), p)
    assert y.dtype == dtype
    assert (y == 0).sum().item() == pytest.approx(y.numel() * p, abs=5 * (y.numel() * p * (1 - p)) ** 0.5)
    torch.testing.assert_close(y[y != 0].unique(), torch.tensor([1 / (1 - p)], dtype=dtype))


def test_bf16_does_not_round_the_scale_on_the_cpu() -> None:
    """The factor itself would be 1.109 in bf16 and shift every mean, as it does in torch's own dropout on CPUs."""
    x = torch.linspace(1, 2, 100_000, dtype=torch.bfloat16)
    y = BACKENDS["cpu"]().dropout(x, 0.1)
    of_kept = y[y != 0].double().sum() / x[y != 0].double().sum()
    assert of_kept.item() == pytest.approx(1 / 0.9, rel=5e-4)


@pytest.mark.parametrize("layout", ["contiguous", "transposed", "expanded"])
def test_dropout_of_any_layout(ops: Operations, layout: str) -> None:
    x = {
        "contiguous": torch.ones(30, 40),
        "transposed": torch.ones(40, 30).t(),
        "expanded": torch.ones(40).expand(30, 40),
    }[layout]
    y = ops.dropout(x, 0.5)
    assert y.shape == (30, 40)
    assert set(y.unique().tolist()) == {0.0, 2.0}
    assert x.eq(1).all()
    # Each row and each column is dropped by itself.
    assert len(y.unique(dim=0)) == 30
    assert len(y.unique(dim=1).T) == 40


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_same_elements(ops: Operations, dtype: torch.dtype) -> None:
    x = torch.randn(31, 7, dtype=dtype).t().requires_grad_()
    y = ops.dropout(x, 0.3)
    gradient = torch.randn(31, 7, dtype=dtype).t()
    y.backward(gradient)
    kept = (y != 0).to(dtype)
    assert 0 < kept.mean() < 1
    torch.testing.assert_close(y.detach(), x.detach() / 0.7 * kept)
    torch.testing.assert_close(x.grad, gradient / 0.7 * kept)


def test_nothing_and_next_to_nothing_can_be_dropped(ops: Operations) -> None:
    assert ops.dropout(torch.ones(0, 5), 0.1).shape == (0, 5)
    x = torch.ones(1000)
    assert all(ops.dropout(x, 1e-9).equal(x) for _ in range(50))


def test_a_seed_gives_the_same_elements_again(ops: Operations) -> None:
    x = torch.ones(1001)
    torch.manual_seed(5)
    first, second = ops.dropout(x, 0.1), ops.dropout(x, 0.1)
    torch.manual_seed(5)
    assert ops.dropout(x, 0.1).equal(first)
    assert not first.equal(second)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_elements_are_independent(ops: Operations, p: float) -> None:
    dropped = (ops.dropout(torch.ones(400_000), p) == 0).float()
    for distance in (1, 2, 3, 10):
        together = (dropped[distance:] * dropped[:-distance]).mean().item()
        assert together == pytest.approx(p * p, abs=0.005)


@pytest.mark.parametrize("p", [0.1, 0.9])
def test_every_element_is_dropped_as_often(ops: Operations, p: float) -> None:
    """The first and the last too, over many short draws."""
    count = sum((ops.dropout(torch.ones(12), p) == 0).float() for _ in range(4_000))
    assert (count - 4_000 * p).abs().max() < 5 * (4_000 * p * (1 - p)) ** 0.5


def test_more_elements_than_expected_can_be_dropped_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, where every random number makes the least of gaps: there are seven times as many as are drawn."""
    monkeypatch.setattr(torch, "rand", torch.zeros)
    assert not BACKENDS["cpu"]().dropout(torch.ones(1000), 0.1).any()


def test_dropout_on_the_cpu_keeps_four_bytes_per_dropped_element() -> None:
    kept: list[int] = []
    x = torch.randn(100_000, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.nbytes) or t, lambda t: t):
        y = BACKENDS["cpu"]().dropout(x, 0.1)
    assert sum(kept) == 4 * int((y == 0).sum())


def test_more_elements_than_places_are_refused() -> None:
    with pytest.raises(ValueError, match="lower --batch-size"):
        cpu.dropout(torch.empty(1).expand(1 << 30), 0.1)
