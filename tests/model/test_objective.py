"""The output head: logits, or the summed cross-entropies of both losses."""

import math

import pytest
import torch

from arplus.model.batch import IGNORED
from arplus.model.objective import OutputHead


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_nats_are_those_of_the_logits(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    head, hidden_GND = OutputHead(8, 30, bias=False), 5 * torch.randn(2, 7, 8)
    target_N = torch.randint(30, (7,), dtype=dtype)
    target_N[3] = IGNORED
    logits_GNV = head(hidden_GND)
    torch.testing.assert_close(logits_GNV, hidden_GND @ head.weight.T)
    log_p = logits_GNV.log_softmax(-1)
    expected = -sum(log_p[:, n, target_N[n]] for n in (0, 1, 2, 4, 5, 6))
    torch.testing.assert_close(head(hidden_GND, target_N), expected)


@pytest.mark.parametrize("targets", [[], [IGNORED] * 7])
def test_no_target_is_no_loss(targets: list[int]) -> None:
    head = OutputHead(8, 30, bias=False)
    nats_G = head(torch.randn(2, len(targets), 8, requires_grad=True), torch.tensor(targets, dtype=torch.int64))
    nats_G.sum().backward()
    assert nats_G.tolist() == [0, 0]
    assert not head.weight.grad.any()


def test_nats_are_summed_in_fp32() -> None:
    """Thousands of them in bf16 would stop growing."""
    head, target_N = OutputHead(8, 30, bias=False), torch.zeros(3000, dtype=torch.int64)
    with torch.autocast("cpu", torch.bfloat16):
        nats_G = head(torch.zeros(1, 3000, 8), target_N)
    assert nats_G.dtype == torch.float32
    assert nats_G.item() == pytest.approx(3000 * math.log(30), rel=1e-4)
