"""The linear layer against torch's, on both of its paths."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from arplus.model import linear as module
from arplus.model.linear import Linear, linear


@pytest.fixture(autouse=True, params=[0, 1 << 60], ids=["onednn", "torch"])
def least(request, monkeypatch):
    """Products of the tests' size by oneDNN, as large ones are, and by torch."""
    monkeypatch.setattr(module, "_LEAST", request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 12), (3, 5, 12), (0, 12), (12,)])
def test_equals_torchs_with_and_without_gradients(dtype, bias, shape):
    torch.manual_seed(0)
    layer, theirs = Linear(12, 9, bias=bias, dtype=dtype), nn.Linear(12, 9, bias=bias, dtype=dtype)
    theirs.load_state_dict(layer.state_dict())
    x = torch.randn(shape, dtype=dtype, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    found, expected = layer(x), theirs(same)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected.detach())
    found.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)
    for mine, other in zip(layer.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad)


@torch.no_grad()
def test_strides_are_respected():
    x, weight, bias = torch.randn(12, 5, 7).permute(2, 1, 0), torch.randn(12, 9).t(), torch.randn(9)
    torch.testing.assert_close(linear(x, weight, bias), functional.linear(x, weight, bias))
    bias = torch.randn(18)[::2]
    torch.testing.assert_close(linear(x[:, 2], weight, bias), functional.linear(x[:, 2], weight, bias))


@torch.no_grad()
def test_autocast_stays():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Linear(12, 9)(torch.randn(7, 12)).dtype == torch.bfloat16
