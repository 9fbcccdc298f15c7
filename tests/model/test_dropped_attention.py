"""Attention under dropout against the same mask and torch's autograd."""

import pytest
import torch

from arplus.model.dropout import draw_dropped, drop_
from arplus.model.dropped_attention import dropped_attention

B, H, T, S, C, P = 3, 2, 5, 7, 4, 0.25


@pytest.mark.parametrize("masked", ["nothing", "padding", "future"])
def test_value_and_gradients(masked: str) -> None:
    torch.manual_seed(0)
    S_ = T if masked == "future" else S
    tensors = [torch.randn(B, n, H, C, dtype=torch.float64) for n in (T, S_, S_)]
    query, key, value = (t.transpose(1, 2).requires_grad_() for t in tensors)
    mask = {
        "nothing": None,
        "padding": (torch.arange(S) < torch.tensor([7, 1, 4])[:, None])[:, None, None],
        "future": torch.ones(T, T, dtype=torch.bool).tril(),
    }[masked]
    gradient = torch.randn(B, H, T, C, dtype=torch.float64)

    torch.manual_seed(1)
    ours = dropped_attention(query, key, value, mask, P)
    found = torch.autograd.grad(ours, (query, key, value), gradient)

    torch.manual_seed(1)
    kept = drop_(torch.ones(B, H, T, S_, dtype=torch.float64), draw_dropped(B * H * T * S_, P))
    assert kept.min() == 0
    score = query @ key.transpose(-1, -2) / C**0.5
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    theirs = (score.softmax(-1) * kept / (1 - P)) @ value
    expected = torch.autograd.grad(theirs, (query, key, value), gradient)
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)
