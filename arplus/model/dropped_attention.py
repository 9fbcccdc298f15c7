"""Attention under dropout on the CPU, where torch has no fused kernel for it.

Its backward pass is written out, so that it keeps the weights once and no mask, scales what is narrow, and copies keys
once. Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import math
from typing import Any

import torch
from torch import Tensor

from arplus.model.dropout import draw_dropped, drop_


def dropped_attention(
    query_BHTC: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, mask: Tensor | None, p: float
) -> Tensor:
    """dropout(softmax(q·k / √C)) · v, (B, H, T, C); ``mask`` is bool, True where to look, and broadcasts to B, 1, T, S.

    Every row of the mask must have a True.
    """
    attended_BHTC: Tensor = _DroppedAttention.apply(query_BHTC, key_BHSC, value_BHSC, mask, p)
    return attended_BHTC


class _DroppedAttention(torch.autograd.Function):
    """All in the dtype of the query; Z stands for B·H."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float) -> Tensor:
        query_ZTC, key_ZSC, value_ZSC = (t.reshape(-1, *t.shape[2:]) for t in (query, key, value))
        score_ZTS = _scaled(query_ZTC, key_ZSC.transpose(1, 2), 1 / math.sqrt(query.shape[-1]))
        if mask is not None:
            # Added, which is vectorised, where masked_fill is not.
            score_BHTS = score_ZTS.unflatten(0, query.shape[:2])
            score_BHTS += torch.zeros(mask.shape, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        weight_ZTS = score_ZTS.softmax(-1)
        place_M = draw_dropped(weight_ZTS.numel(), p)
        ctx.save_for_backward(query_ZTC, key_ZSC, value_ZSC, weight_ZTS, place_M)
        ctx.scale = 1 / (1 - p)
        dropped_ZTS = drop_(score_ZTS.copy_(weight_ZTS), place_M)
        return _scaled(dropped_ZTS, value_ZSC, ctx.scale).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_ZTC, key_ZSC, value_ZSC, weight_ZTS, place_M = ctx.saved_tensors
        (gradient,) = gradients
        B, H = gradient.shape[:2]
        scaled_ZTC = gradient.reshape(query_ZTC.shape) * ctx.scale
        d_weight_ZTS = drop_(scaled_ZTC @ value_ZSC.transpose(1, 2), place_M)
        d_value_ZSC = drop_(weight_ZTS.clone(), place_M).transpose(1, 2) @ scaled_ZTC
        d_score_ZTS = torch._softmax_backward_data(d_weight_ZTS, weight_ZTS, -1, weight_ZTS.dtype)
        factor = 1 / math.sqrt(query_ZTC.shape[-1])
        d_query_ZTC = _scaled(d_score_ZTS, key_ZSC, factor)
        d_key_ZSC = _scaled(d_score_ZTS.transpose(1, 2), query_ZTC, factor)
        return *(d.unflatten(0, (B, H)) for d in (d_query_ZTC, d_key_ZSC, d_value_ZSC)), None, None


def _scaled(a: Tensor, b: Tensor, factor: float) -> Tensor:
    """Factor · a·b, in the product itself."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=factor)
