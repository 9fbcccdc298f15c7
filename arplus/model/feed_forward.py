"""The position-wise feed-forward; its wide part, where it is factored, without keeping what is FF wide.

Between the two products there is dropout alone, so the 2048-wide activation is a product of narrow things. On the CPU
it is computed, dropped and contracted in chunks that stay in the cache, and again in the backward pass, which keeps a
byte an element (the dropout's mask) instead of five.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig
from arplus.model.dropout import Dropout, draw_kept, dropout, levels_of, scale_of
from arplus.model.linear import Linear, linear

_CHUNK = 512
"""Tokens at a time: 4 MB of fp32 at FF = 2048, what two cores' caches hold."""


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
            # bf16 as autocast would have it: the function's own products are out of its sight.
            dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
            y: Tensor = _Wide.apply(x.flatten(0, -2), *parameters, levels_of(self.p), dtype)
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
            x, expand_T, contract_T = x.to(dtype), expand.to(dtype).t(), contract.to(dtype).t()
            expand_bias, bias = expand_bias.to(dtype), bias.to(dtype)
            kept = torch.empty(len(x), len(expand), dtype=torch.int8)
            y = torch.empty(len(x), len(contract), dtype=dtype)
            for i in range(0, len(x), _CHUNK):
                part = slice(i, i + _CHUNK)
                wide = torch.addmm(expand_bias, x[part], expand_T)
                drawn = draw_kept(wide.shape, levels)
                kept[part] = drawn
                torch.addmm(bias, wide.mul_(drawn), contract_T, alpha=scale_of(levels), out=y[part])
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
            to_expand, to_contract = expand.to(x.dtype), contract.to(x.dtype)
            d_x = torch.empty_like(x)
            d_expand, d_expand_bias, d_contract = (
                torch.zeros_like(t, dtype=torch.float32) for t in (expand, expand_bias, contract)
            )
            for i in range(0, len(x), _CHUNK):
                part = slice(i, i + _CHUNK)
                mask = kept[part].to(x.dtype)
                wide = torch.addmm(expand_bias, x[part], to_expand.t()).mul_(mask)
                d_contract += scaled[part].t() @ wide
                d_wide = torch.mm(scaled[part], to_contract, out=wide).mul_(mask)
                d_expand += d_wide.t() @ x[part]
                d_expand_bias += d_wide.sum(0)
                torch.mm(d_wide, to_expand, out=d_x[part])
            return d_x, d_expand, d_expand_bias, d_contract, gradient.sum(0), None, None
