"""The two losses of L = L_D + λ1 · L_LM (Eq. 4) as sums and counts, to be divided once by global counts."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


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
    nats_2N = functional.cross_entropy(logits_MV.float(), target_N.repeat(2), reduction="none").view(2, -1)
    dialogue, auxiliary = nats_2N.sum(dim=1)
    count = torch.full_like(dialogue, target_N.numel())
    return Losses(dialogue, count, auxiliary, count.clone())
