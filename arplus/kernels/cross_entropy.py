"""A product with the output head and its cross-entropies, whose logits never exist as a whole; for CPUs and GPUs.

The gradients are made in the forward pass, where the logits are, but for the factor that the backward pass brings.
torch's own linear_cross_entropy does likewise, and gives the sum of the nats in bf16 under autocast, 0.4 % off. Shape
suffixes are those of :mod:`arplus.model.ops`.
"""

from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, None], Tensor]


def linear_cross_entropies(
    hidden_GND: Tensor, weight_VD: Tensor, target_N: Tensor, *, linear: Product, rows: int, at_once: int
) -> Tensor:
    """:meth:`Operations.cross_entropies`, ``rows`` logits at a time, ``at_once`` of which go through the softmax.

    ``linear`` is :meth:`Operations.linear` of the backend.
    """
    kind = hidden_GND.device.type
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if mixed else hidden_GND.dtype
    how = (linear, rows, at_once)
    if not torch.is_grad_enabled():  # which the function itself cannot ask
        hidden_GND, weight_VD = hidden_GND.detach(), weight_VD.detach()
    nats_G: Tensor = _LinearCrossEntropies.apply(hidden_GND, weight_VD, target_N, dtype, how)
    return nats_G


class _LinearCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_GND: Tensor, weight_VD: Tensor, target_N: Tensor, dtype: torch.dtype, how: Any
    ) -> Tensor:
        # Cast here and not by autocast, which would keep the weight's copy for others, without its gradient.
        hidden_GND, weight_VD = hidden_GND.to(dtype), weight_VD.to(dtype)
        wanted = ctx.needs_input_grad[:2]
        found = [_summed(hidden_ND, weight_VD, target_N, wanted, *how) for hidden_ND in hidden_GND]
        ctx.save_for_backward(*(gradient for _, *gradients in found for gradient in gradients))
        return torch.stack([nats for nats, *_ in found])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient_G,), saved = gradients, ctx.saved_tensors
        # In place, since fresh memory for what is V × D costs as much as writing it; autograd refuses a second pass.
        d_hidden, d_weight = (
            None if of[0] is None else [d.mul_(g) for d, g in zip(of, gradient_G, strict=True)]
            for of in (saved[::2], saved[1::2])
        )
        return (
            None if d_hidden is None else torch.stack(d_hidden),
            None if d_weight is None else reduce(Tensor.add_, d_weight),
            *[None] * 3,
        )


def _summed(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    wanted: tuple[bool, bool],
    linear: Product,
    rows: int,
    at_once: int,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Nats summed over N, and as far as they are wanted their gradients to the hidden states and the weight."""
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    nats = torch.zeros((), device=hidden_ND.device, dtype=wide)
    d_hidden_ND = torch.empty_like(hidden_ND) if wanted[0] else None
    d_weight_VD: Tensor | None = None
    for i in range(0, max(len(target_N), 1), rows):
        part = slice(i, i + rows)
        logits = linear(hidden_ND[part], weight_VD, None)
        for of, target in zip(logits.split(at_once), target_N[part, None].split(at_once), strict=True):
            counted = target >= 0  # else :data:`IGNORED`
            log_p = of.log_softmax(1, dtype=wide)
            nats -= (log_p.gather(1, target.clamp(min=0)) * counted).sum()
            if any(wanted):
                d_logits = log_p.exp_().scatter_add_(1, target.clamp(min=0), log_p.new_full(target.shape, -1.0))
                of.copy_(d_logits.mul_(counted))
        if d_hidden_ND is not None:
            d_hidden_ND[part] = linear(logits, weight_VD.t(), None)
        if wanted[1]:
            d_weight = (logits.t() @ hidden_ND[part]).to(wide)
            d_weight_VD = d_weight if d_weight_VD is None else d_weight_VD.add_(d_weight)
    return nats, d_hidden_ND, d_weight_VD
