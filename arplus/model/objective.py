"""The two losses of L = L_D + λ1 · L_LM (Eq. 4) as sums and counts, to be divided once by global counts."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

_ROWS = 64
"""Rows of logits at a time: 2.4 MB in fp32 for 9,498 characters."""


class Losses(NamedTuple):
    """Cross-entropies in nats, summed over the targets of counted rows, and how many targets there are; all fp32."""

    sum_dialogue: Tensor
    count_dialogue: Tensor
    sum_auxiliary: Tensor
    count_auxiliary: Tensor


def real_targets(response_BT: Tensor, counted_B: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """Where the targets are and what they are: flat indices into (B, T - 1) and ids, both (N,) int64.

    The target of each id of the response is the next one, [EOS] included; padding and uncounted rows have none.
    """
    target_BT = response_BT[:, 1:]
    index_N = ((target_BT != pad) & counted_B[:, None]).flatten().nonzero().squeeze(1)
    return index_N, target_BT.flatten()[index_N].long()


def losses(logits_MV: Tensor, target_N: Tensor) -> Losses:
    """The losses, given logits of the N targets by the dialogue decoder and then by the auxiliary one (M = 2N)."""
    target_M = target_N.repeat(2)
    if logits_MV.device.type == "cpu":
        nats_M: Tensor = _CrossEntropy.apply(logits_MV, target_M)
    else:
        nats_M = functional.cross_entropy(logits_MV.float(), target_M, reduction="none")
    dialogue, auxiliary = nats_M.view(2, -1).sum(dim=1)
    count = torch.full_like(dialogue, target_N.numel())
    return Losses(dialogue, count, auxiliary, count.clone())


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropies (M,), fp32, on the CPU, in rows that stay in the cache.

    The backward pass writes the gradient over the logits, which nothing else holds by then. torch's own keeps two
    more of these largest tensors of a step (78 MB each at 1,024 targets) and goes over them twice as often.
    """

    @staticmethod
    def forward(ctx: Any, logits_MV: Tensor, target_M: Tensor) -> Tensor:
        total_M = torch.cat([part.float().logsumexp(1) for part in logits_MV.split(_ROWS)])
        ctx.save_for_backward(logits_MV, target_M, total_M)
        return total_M - logits_MV.gather(1, target_M[:, None])[:, 0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits_MV, target_M, total_M = ctx.saved_tensors
        gradient_M1 = gradients[0][:, None]
        for logits, total, gradient in zip(
            *(t.split(_ROWS) for t in (logits_MV, total_M[:, None], gradient_M1)), strict=True
        ):
            logits.copy_((logits - total).exp_().mul_(gradient))
        return logits_MV.scatter_add_(1, target_M[:, None], -gradient_M1.to(logits_MV.dtype)), None
