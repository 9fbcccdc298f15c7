"""The position-wise feed-forward; its wide part, where it is factored, without keeping what is FF wide.

Between the two products there is dropout alone, so the 2048-wide activation is a product of narrow things. On the CPU
it is computed, dropped and contracted in chunks, and again in the backward pass, which keeps a byte an element (the
dropout's mask) instead of five.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig
from arplus.model.dropout import Dropout, draw_kept, draw_levels, dropout, scale_of
from arplus.model.linear import Linear, linear, product_dtype

_CHUNK = 1024
"""Tokens at a time: 8 MB of fp32 at FF = 2048. Half as many took 2 % longer; all at once no less, and 0.2 GB more."""


def feed_forward(config: ModelConfig) -> nn.Sequential:
    """Position-wise feed-forward: d → FF → d, or factored d → r → FF → r → d, with a ReLU at each r."""
    d, wide, r, p = config.d_model, config.ff_size, config.ff_bottleneck, config.dropout
    if r is None:
        return nn.Sequential(Linear(d, wide), nn.ReLU(), Dropout(p), Linear(wide, d))
    return nn.Sequential(Linear(d, r), nn.ReLU(), Wide(r, wide, p), nn.ReLU(), Dropout(p), Linear(r, d))


def folded(feed_forward: nn.Sequential) -> nn.Sequential:
    """The same function without dropout, for these weights: factored, r → FF → r is linear, and so one r → r product.

    Of 512,000 multiplications a position 112,400 are left, for 21 million of folding.
    """
    if not isinstance(feed_forward[2], Wide):
        return feed_forward
    narrow, relu, wide, _, _, widen = feed_forward
    assert isinstance(wide, Wide)
    return nn.Sequential(narrow, relu, wide.folded(), relu, widen)


class Wide(nn.Module):
    """contract(dropout(expand(x))), one module, so that ZeRO-3 gathers both matrices for both passes."""

    def __init__(self, r: int, wide: int, p: float) -> None:
        super().__init__()
        self.p = p
        self.expand_weight = nn.Parameter(torch.empty(wide, r))
        self.expand_bias = nn.Parameter(torch.empty(wide))
        self.contract_weight = nn.Parameter(torch.empty(r, wide))
        self.contract_bias = nn.Parameter(torch.empty(r))
        for weight, bias in (
            (self.expand_weight, self.expand_bias),
            (self.contract_weight, self.contract_bias),
        ):  # as torch.nn.Linear does
            bound = 1 / math.sqrt(weight.shape[1])
            nn.init.uniform_(weight, -bound, bound)
            nn.init.uniform_(bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """(…, r) to (…, r)."""
        parameters = (self.expand_weight, self.expand_bias, self.contract_weight, self.contract_bias)
        if self.training and self.p and x.device.type == "cpu":
            y: Tensor = _Wide.apply(x.flatten(0, -2), *parameters, draw_levels(self.p), product_dtype(x))
            return y.view(x.shape)
        wide = linear(x, self.expand_weight, self.expand_bias)
        return linear(dropout(wide, self.p, self.training), self.contract_weight, self.contract_bias)

    @torch.no_grad()
    def folded(self) -> Linear:
        """The same map without dropout, for these weights, as one r → r product."""
        r = len(self.contract_weight)
        product = nn.utils.skip_init(Linear, r, r, device=self.contract_weight.device)
        product.weight = nn.Parameter(self.contract_weight @ self.expand_weight)
        product.bias = nn.Parameter(linear(self.expand_bias, self.contract_weight, self.contract_bias))
        return product


class _Wide(torch.autograd.Function):
    """The chunks. x is (N, r); dropout's scale is applied to what is r wide."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(
        ctx: Any,
        x: Tensor,
        expand: Tensor,
        expand_bias: Tensor,
        contract: Tensor,
        bias: Tensor,
        levels: int,
        dtype: Any,
    ) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            x, to_expand, to_contract = x.to(dtype), expand.to(dtype), (contract * scale_of(levels)).to(dtype)
            expand_bias, bias = expand_bias.to(dtype), bias.to(dtype)
            kept = torch.empty(len(x), len(expand), dtype=torch.int8)
            y = torch.empty(len(x), len(contract), dtype=dtype)
            for i in range(0, len(x), _CHUNK):
                part = slice(i, i + _CHUNK)
                wide = linear(x[part], to_expand, expand_bias)
                drawn = draw_kept(wide.shape, levels)
                kept[part] = drawn
                y[part] = linear(wide.mul_(drawn), to_contract, bias)
            ctx.save_for_backward(x, expand, expand_bias, contract, kept)
            ctx.levels = levels
            return y

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, expand, expand_bias, contract, kept = ctx.saved_tensors
        with torch.autocast("cpu", enabled=False):
            gradient = gradients[0].to(x.dtype)
            scaled = gradient * scale_of(ctx.levels)
            to_expand, to_contract_T = expand.to(x.dtype), contract.to(x.dtype).t()
            d_x = torch.empty_like(x)
            d_expand_bias = torch.zeros_like(expand_bias, dtype=torch.float32)
            # Both are r × FF: 87 GFLOP/s on a core where FF × r, which the first would be, has 57.
            d_expand_T, d_contract = (torch.zeros_like(contract, dtype=torch.float32) for _ in range(2))
            for i in range(0, len(x), _CHUNK):
                part = slice(i, i + _CHUNK)
                mask = kept[part].to(x.dtype)
                wide = linear(x[part], to_expand, expand_bias).mul_(mask)
                d_contract += linear(scaled[part].t(), wide.t(), None)
                d_wide = linear(scaled[part], to_contract_T, None).mul_(mask)
                d_expand_T += linear(x[part].t(), d_wide.t(), None)
                d_expand_bias += d_wide.sum(0)
                d_x[part] = linear(d_wide, to_expand.t(), None)
            return d_x, d_expand_T.t(), d_expand_bias, d_contract, gradient.sum(0), None, None
