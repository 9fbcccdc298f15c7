"""The generator, and the two losses of L = L_D + λ1 · L_LM (Eq. 4) as sums and counts, to be divided by global counts.

Shape suffixes are those of :mod:`arplus.model.batch`; G is the two losses.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from arplus.model.linear import Linear, linear, product_dtype

_ROWS = 1024
"""Rows of logits at a time: 39 MB in fp32 for 9,498 characters."""
_ROWS_AT_ONCE = 64
"""Those of them that go through the softmax together on the CPU: 2.4 MB, which stay in its cache."""
_GPU_ROWS = 8192
"""The same on a GPU, where more rows keep it busier: 156 MB in bf16, and twice that for their softmax."""


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


class Generator(Linear):
    """The output projection: hidden states to logits, or straight to cross-entropies.

    One module for both, so that ZeRO-3 gathers the matrix for the losses too.
    """

    def forward(self, hidden: Tensor, target_N: Tensor | None = None) -> Tensor:
        """(…, D) to logits (…, V); (G, N, D) with targets (N,) to cross-entropies (G,), nats summed over N, fp32."""
        if target_N is None:
            return super().forward(hidden)
        nats_G: Tensor = _LinearCrossEntropy.apply(
            hidden, self.weight, target_N, product_dtype(hidden), torch.is_grad_enabled()
        )
        return nats_G


class _LinearCrossEntropy(torch.autograd.Function):
    """A product with the generator and its cross-entropies, whose logits never exist as a whole.

    The gradients are made in the forward pass, where the logits are, but for the factor that the backward pass brings.
    (torch's own linear_cross_entropy does likewise, and gives the sum of the nats in bf16 under autocast.)
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_GND: Tensor, weight_VD: Tensor, target_N: Tensor, dtype: torch.dtype, train: bool
    ) -> Tensor:
        # Cast here and not by autocast, which would keep the weight's copy for others, without its gradient.
        hidden_GND, weight_VD = hidden_GND.to(dtype), weight_VD.to(dtype)
        found = [_summed(hidden_ND, weight_VD, target_N, train) for hidden_ND in hidden_GND]
        ctx.save_for_backward(*(gradient for _, *gradients in found for gradient in gradients))
        return torch.stack([nats for nats, *_ in found])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_G,), saved = gradients, ctx.saved_tensors
        # In place, since fresh memory for what is V × D costs as much as writing it; autograd refuses a second pass.
        d_hidden = [d.mul_(g) for d, g in zip(saved[::2], gradient_G, strict=True)]
        first, *others = (d.mul_(g) for d, g in zip(saved[1::2], gradient_G, strict=True))
        for other in others:
            first += other
        return torch.stack(d_hidden), first, None, None, None


def _summed(hidden_ND: Tensor, weight_VD: Tensor, target_N: Tensor, train: bool) -> tuple[Tensor, ...]:
    """Nats summed over N, fp32; in training also their gradients to the hidden states and the weight."""
    rows, at_once = (_ROWS, _ROWS_AT_ONCE) if hidden_ND.device.type == "cpu" else (_GPU_ROWS, _GPU_ROWS)
    nats = torch.zeros((), device=hidden_ND.device)
    d_hidden_ND, d_weight_VD = torch.empty_like(hidden_ND), None
    for i in range(0, max(len(target_N), 1), rows):
        part = slice(i, i + rows)
        logits = linear(hidden_ND[part], weight_VD, None)
        for of, target in zip(logits.split(at_once), target_N[part, None].split(at_once), strict=True):
            log_p = of.log_softmax(1, dtype=torch.float32)
            nats -= log_p.gather(1, target).sum()
            if train:
                of.copy_(log_p.exp_().scatter_add_(1, target, log_p.new_full(target.shape, -1.0)))
        if train:
            d_hidden_ND[part] = linear(logits, weight_VD.t(), None)
            d_weight = (logits.t() @ hidden_ND[part]).float()
            d_weight_VD = d_weight if d_weight_VD is None else d_weight_VD.add_(d_weight)
    return (nats, d_hidden_ND, d_weight_VD) if d_weight_VD is not None else (nats,)
