"""The output head, and L_D, L_LM and L_W as separate sums (Eq. 3 and 4), which ``ObjectiveConfig.total`` weights.

Shape suffixes are those of :mod:`arplus.model.batch`; G is the two losses.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy

from arplus.model.batch import IGNORED
from arplus.model.ops import Linear


class Losses(NamedTuple):
    """Cross-entropies in nats, to be divided by global counts; all fp32."""

    sum_dialogue: Tensor
    """Of L_D, over the targets."""
    sum_auxiliary: Tensor
    """Of L_LM, over the targets."""
    sum_weight: Tensor | None = None
    """Of L_W, over the examples; None where no weight is predicted."""
    sum_a: Tensor | None = None
    """The predicted weights a, over the examples."""

    def together(self) -> Tensor:
        """Those that there are, without their gradients: (2,), or (4,) where a weight is predicted."""
        return torch.stack([loss for loss in self if loss is not None]).detach()


class OutputHead(Linear):
    """Hidden states to logits, or straight to cross-entropies.

    One module for both, so that ZeRO-3 gathers the matrix for the losses too.
    """

    def forward(self, hidden: Tensor, target_N: Tensor | None = None) -> Tensor:
        """(…, D) to logits (…, V); (G, N, D) with targets (N,) to cross-entropies (G,), nats summed over N, fp32."""
        logits = super().forward(hidden)
        if target_N is None:
            return logits
        target_N = target_N.long()
        nats = [cross_entropy(x, target_N, reduction="sum", ignore_index=IGNORED) for x in logits.float()]
        return torch.stack(nats)


def weight_sums(z_B: Tensor, persona_related_B: Tensor) -> tuple[Tensor, Tensor]:
    """L_W = -Σ r·ln a + (1 - r)·ln(1 - a) for a = σ(z), and Σ a, over the examples whose label r is not IGNORED."""
    counted_B = persona_related_B != IGNORED
    r_B = (persona_related_B * counted_B).to(z_B.dtype)
    nats = binary_cross_entropy_with_logits(z_B, r_B, counted_B.to(z_B.dtype), reduction="sum")
    return nats, (z_B.sigmoid() * counted_B).sum()
