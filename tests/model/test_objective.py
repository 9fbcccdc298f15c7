"""Cross-entropies in rows against torch's."""

import pytest
import torch
from torch.nn import functional

from arplus.model import objective


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_and_gradient(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objective, "_ROWS", 4)
    torch.manual_seed(0)
    start, target = (torch.randn(10, 30) * 5).to(dtype), torch.randint(30, (5,))

    def gradient(of: str) -> tuple[torch.Tensor, torch.Tensor]:
        leaf = start.clone().requires_grad_()
        logits = leaf * 1  # as a product's result: the gradient is written over it
        if of == "ours":
            found = objective.losses(logits, target)
            dialogue, auxiliary = found.sum_dialogue, found.sum_auxiliary
        else:
            nats = functional.cross_entropy(logits.float(), target.repeat(2), reduction="none")
            dialogue, auxiliary = nats[:5].sum(), nats[5:].sum()
        total = 0.7 * dialogue + 0.2 * auxiliary
        return total, torch.autograd.grad(total, leaf)[0]

    (ours, d_ours), (theirs, d_theirs) = gradient("ours"), gradient("torch")
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(d_ours, d_theirs)


def test_no_target_is_no_loss() -> None:
    logits = torch.randn(0, 30, requires_grad=True)
    found = objective.losses(logits * 1, torch.empty(0, dtype=torch.int64))
    assert found.sum_dialogue == found.count_dialogue == 0
    found.sum_dialogue.backward()
