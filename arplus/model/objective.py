"""The output head, and L_D and L_LM as separate sums; the engine weights them with λ1 (Eq. 4).

Shape suffixes are those of :mod:`arplus.model.batch`; G is the two losses.
"""

from typing import NamedTuple

from torch import Tensor

from arplus.model.ops import Linear


class Losses(NamedTuple):
    """Cross-entropies in nats, summed over the targets, to be divided by global counts; all fp32."""

    sum_dialogue: Tensor
    """Of L_D."""
    sum_auxiliary: Tensor
    """Of L_LM."""


class OutputHead(Linear):
    """Hidden states to logits, or straight to cross-entropies.

    One module for both, so that ZeRO-3 gathers the matrix for the losses too.
    """

    def forward(self, hidden: Tensor, target_N: Tensor | None = None) -> Tensor:
        """(…, D) to logits (…, V); (G, N, D) with targets (N,) to cross-entropies (G,), nats summed over N, fp32."""
        if target_N is None:
            return super().forward(hidden)
        return self.ops.cross_entropies(hidden, self.weight, target_N.long())
