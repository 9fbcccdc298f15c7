"""The operations that kernels may replace: plain PyTorch, which is the reference for all of them.

A module that computes by them is a :class:`Module`, and reads them from ``self.ops``. :func:`arplus.kernels.use` sets
others there, once, when an engine or a responder is built. Shape suffixes are those of :mod:`arplus.model.batch`.
"""

from torch import Tensor, nn
from torch.nn import functional


class Operations:
    """The reference. A backend overrides what it does better; results agree up to rounding, dropout in distribution."""

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product x · weightᵀ + bias."""
        return functional.linear(x, weight, bias)

    def dropout(self, x: Tensor, p: float) -> Tensor:
        """Zeroes each element with probability p and scales the others up by 1 / (1 - p)."""
        return functional.dropout(x, p)

    def attend(self, query_HBTC: Tensor, key_HBSC: Tensor, value_HBSC: Tensor, mask: Tensor | None, p: float) -> Tensor:
        """dropout(softmax(q·k / √C + mask)) · v, (H, B, T, C).

        The mask is -inf where not to look and broadcasts to (H, B, T, S); no row of it is all -inf.
        """
        return functional.scaled_dot_product_attention(query_HBTC, key_HBSC, value_HBSC, mask, dropout_p=p)


class Module(nn.Module):
    """A module that computes by exchangeable operations."""

    ops = Operations()


class Linear(nn.Linear, Module):
    """torch's layer by :meth:`Operations.linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Projects the last dimension."""
        return self.ops.linear(input, self.weight, self.bias)


class Dropout(Module):
    """Dropout in training."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """Drops elements of x in training."""
        return self.ops.dropout(x, self.p) if self.training and self.p else x
