"""The position-wise feed-forward; in fp32 on the CPU its wide part, where factored, is counted from what is dropped.

Between the two products there is dropout alone: they are one r → r map less what the dropped elements would have
brought, a tenth of all. So a pass forward and backward takes six rows of r numbers for each dropped element, where six
products of matrices take as many for every element.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.config import ModelConfig
from arplus.model.dropout import Dropout, draw_dropped, dropout
from arplus.model.linear import Linear, linear, product_dtype

_LEAST = 1 << 23
"""Wide multiplications for which rows pay; the tiny demo's are fewer, and took 1.5 to 2 times as long with them."""

_MOST = 0.15
"""Dropout up to which they pay: for 700 tokens 0.64 of the products' time at 0.1, 1.12 at 0.2 (one thread)."""


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
        if self.training and self.p and self._is_counted(x):
            # At p = 0.1 half the time of the products for 2,048 tokens, a step of the real size 0.91 to 0.96 (two
            # threads). In bf16, whose products are faster, it would be 1.05.
            scale = 1 / (1 - self.p)
            parameters = (self.expand_weight, self.expand_bias, self.contract_weight)
            dropped = _AtDropped.apply(x.flatten(0, -2), *parameters, self.p).view(x.shape)
            return torch.sub(linear(x, *self._folded(scale)), dropped, alpha=scale)
        wide = linear(x, self.expand_weight, self.expand_bias)
        return linear(dropout(wide, self.p, self.training), self.contract_weight, self.contract_bias)

    def _is_counted(self, x: Tensor) -> bool:
        pays = self.p <= _MOST and x.numel() * len(self.expand_bias) >= _LEAST
        return pays and x.device.type == "cpu" and product_dtype(x) == torch.float32

    @torch.no_grad()
    def folded(self) -> Linear:
        """The same map without dropout, for these weights, as one r → r product."""
        weight, bias = self._folded()
        product = nn.utils.skip_init(Linear, *weight.shape, device=weight.device)
        product.weight, product.bias = nn.Parameter(weight), nn.Parameter(bias)
        return product

    def _folded(self, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        """Weight (r, r) and bias (r,) of scale · contract(expand(x)), where the bias of contract is not scaled."""
        weight = self.contract_weight @ self.expand_weight * scale
        return weight, torch.addmv(self.contract_bias, self.contract_weight, self.expand_bias, alpha=scale)


class _AtDropped(torch.autograd.Function):
    """contract(expand(x)) at the dropped elements alone, for x (N, r), without the bias of contract.

    Shape suffixes: N tokens, F wide elements, R narrow ones, M dropped elements of N × F.
    """

    @staticmethod
    def forward(ctx: Any, x_NR: Tensor, expand_FR: Tensor, bias_F: Tensor, contract_RF: Tensor, p: float) -> Tensor:
        N, F = len(x_NR), len(bias_F)
        place_M = draw_dropped(N * F, p)
        token_M, element_M = place_M // F, place_M % F
        wide_M = _elements(x_NR, expand_FR, token_M, element_M).add_(bias_F.index_select(0, element_M))
        ctx.save_for_backward(x_NR, expand_FR, contract_RF, token_M, element_M, wide_M)
        return _sums(contract_RF.t().contiguous(), element_M, wide_M, _starts(token_M, N))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_NR, expand_FR, contract_RF, token_M, element_M, wide_M = ctx.saved_tensors
        gradient_NR, N, F = gradients[0].contiguous(), len(x_NR), len(expand_FR)
        d_wide_M = _elements(gradient_NR, contract_RF.t().contiguous(), token_M, element_M)
        d_x_NR = _sums(expand_FR, element_M, d_wide_M, _starts(token_M, N))
        # Now by wide elements. Numbers of 16 bits are sorted in half the time of 32.
        by_element_M, order_M = torch.sort(element_M.to(torch.int16 if F < 1 << 15 else torch.int32), stable=True)
        token_M, start_F = token_M.index_select(0, order_M), _starts(by_element_M, F)
        d_contract_FR = _sums(gradient_NR, token_M, wide_M.index_select(0, order_M), start_F)
        d_expand_FR = _sums(x_NR, token_M, d_wide_M.index_select(0, order_M), start_F)
        d_bias_F = torch.bincount(element_M, d_wide_M, F).float()
        return d_x_NR, d_expand_FR, d_bias_F, d_contract_FR.t(), None


def _elements(a_NR: Tensor, b_FR: Tensor, token_M: Tensor, element_M: Tensor) -> Tensor:
    """Elements of a · bᵀ."""
    # The gradient of embedding_bag's weights; there is no public name for it.
    found: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        a_NR, b_FR, element_M, token_M[:1], token_M, 0
    )
    return found


def _sums(table: Tensor, row_M: Tensor, weight_M: Tensor, start: Tensor) -> Tensor:
    """Weighted sums of a table's rows, one from each of ``start`` to the next."""
    return functional.embedding_bag(row_M, table.detach(), start, mode="sum", per_sample_weights=weight_M)


def _starts(sorted_M: Tensor, groups: int) -> Tensor:
    """Where each of the numbers below ``groups`` begins, (groups,) int32."""
    return torch.searchsorted(sorted_M, torch.arange(groups, dtype=sorted_M.dtype), out_int32=True)
