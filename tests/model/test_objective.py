"""The generator's cross-entropies, in chunks and with gradients of their own, against torch's."""

import pytest
import torch
from torch.nn import functional

from arplus.model import objective
from arplus.model.objective import Generator


@pytest.fixture
def generator(monkeypatch: pytest.MonkeyPatch) -> Generator:
    """One of 30 characters; seven rows take several chunks of both kinds, the last of them smaller."""
    monkeypatch.setattr(objective, "_ROWS", 5)
    monkeypatch.setattr(objective, "_ROWS_AT_ONCE", 2)
    torch.manual_seed(0)
    return Generator(8, 30, bias=False)


@pytest.mark.parametrize("bf16", [False, True])
def test_nats_and_gradients(generator: Generator, bf16: bool) -> None:
    hidden, target = torch.randn(2, 7, 8) * 5, torch.randint(30, (7,))

    def losses(fused: bool) -> list[torch.Tensor]:
        leaf = hidden.clone().requires_grad_()
        with torch.autocast("cpu", enabled=bf16):
            if fused:
                nats = generator(leaf, target)
            else:
                logits = generator(leaf).flatten(0, 1).float()
                nats = functional.cross_entropy(logits, target.repeat(2), reduction="none").view(2, 7).sum(1)
        assert nats.dtype == torch.float32
        return [nats, *torch.autograd.grad(0.7 * nats[0] + 0.2 * nats[1], [leaf, generator.weight])]

    for ours, theirs in zip(losses(fused=True), losses(fused=False), strict=True):
        # Nats come from the same logits; gradients are rounded to bf16 at another place than autocast's.
        loose = bf16 and ours.dim() > 1
        torch.testing.assert_close(ours, theirs, **({"rtol": 1.6e-2, "atol": 2e-2} if loose else {}))


def test_without_gradients_there_are_the_same_nats(generator: Generator) -> None:
    hidden, target = torch.randn(2, 7, 8), torch.randint(30, (7,))
    with torch.no_grad():
        evaluated = generator(hidden, target)
    assert torch.equal(evaluated, generator(hidden, target).detach())


def test_no_target_is_no_loss(generator: Generator) -> None:
    nats = generator(torch.randn(2, 0, 8, requires_grad=True), torch.empty(0, dtype=torch.int64))
    nats.sum().backward()
    assert nats.tolist() == [0, 0]
    assert not generator.weight.grad.any()
