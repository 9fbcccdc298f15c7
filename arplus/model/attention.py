"""Attention routing: one query, one set of weights, and up to three routes O_prev, O_C and O_T (Eq. 1 and 2).

Shape suffixes are those of :mod:`arplus.model.batch`; C is the width d / H of one head.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.model.dropped_attention import dropped_attention
from arplus.model.linear import Linear, linear


class KeyValue(NamedTuple):
    """What can be attended to: keys and values of all heads, and which positions are real (None: all of them)."""

    key_BHSC: Tensor
    value_BHSC: Tensor
    real_B11S: Tensor | None = None

    def followed_by(self, new: "KeyValue") -> "KeyValue":
        """These positions and then the new ones: the cache of step by step decoding."""
        return KeyValue(torch.cat([self.key_BHSC, new.key_BHSC], 2), torch.cat([self.value_BHSC, new.value_BHSC], 2))

    def for_steps(self) -> "KeyValue":
        """A memory laid out in the CPU's memory as one query at a time reads it, in each step and layer again."""
        if self.key_BHSC.device.type != "cpu":
            return self
        key_BHCS = self.key_BHSC.transpose(-1, -2).contiguous()
        return KeyValue(key_BHCS.transpose(-1, -2), self.value_BHSC.contiguous(), self.real_B11S)


class Routes(NamedTuple):
    """What the decoder's routes found."""

    merged_BTD: Tensor
    """The heads of O_merge = O_T + O_C + O_prev (Eq. 2), or of as many as the model has; the output projection is
    still to come."""
    memories_BTD: Tensor | None
    """Those of O_T + O_C alone; None where only O_prev exists."""
    own: KeyValue
    """Keys and values of the sequence itself up to here."""


class RouteOutput(Linear):
    """The output projection. Applied to a sum of routes it counts its bias once a route, as separate calls would."""

    def forward(self, heads_BTD: Tensor, routes: int | Tensor = 1) -> Tensor:
        """Projects the summed heads of ``routes`` routes; of weighted routes it is the sum of the weights."""
        return linear(heads_BTD, self.weight, None if self.bias is None else self.bias * routes)


class Attention(nn.Module):
    """Multi-head attention whose weights serve the encoder and every route of the decoder."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.query = Linear(d_model, d_model)
        self.key_value = Linear(d_model, 2 * d_model)
        self.output = RouteOutput(d_model, d_model)

    def reset_parameters(self) -> None:
        """Initialises as torch.nn.MultiheadAttention does: Xavier for the stacked (3d, d) matrix, biases zero."""
        bound = math.sqrt(6 / (4 * self.query.in_features))
        for module in (self.query, self.key_value):
            nn.init.uniform_(module.weight, -bound, bound)
        nn.init.xavier_uniform_(self.output.weight)
        for module in (self.query, self.key_value, self.output):
            nn.init.zeros_(module.bias)

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """The encoder's self-attention."""
        return self.output(self._attend(self._split(self.query(x_BSD)), self.keys_and_values(x_BSD, real_BS)))

    def routes(self, x_BTD: Tensor, memories: Sequence[KeyValue], past: KeyValue | None = None) -> Routes:
        """The decoder's routes: from x to itself (causal), and to each memory, all with one query.

        With ``past``, x is the one position that follows it. The routes are summed before the output projection.
        """
        query_BHTC = self._split(self.query(x_BTD))
        own = self.keys_and_values(x_BTD)
        if past is not None:
            assert x_BTD.shape[1] == 1, "cached decoding goes one position at a time"
            own = past.followed_by(own)
        heads_BTD = self._attend(query_BHTC, own, causal=past is None)
        if not memories:
            return Routes(heads_BTD, None, own)
        memories_BTD = torch.stack([self._attend(query_BHTC, memory) for memory in memories]).sum(0)
        return Routes(heads_BTD + memories_BTD, memories_BTD, own)

    def keys_and_values(self, x_BSD: Tensor, real_BS: Tensor | None = None) -> KeyValue:
        """Keys and values of a sequence; of a memory they are the same in every application of a shared layer."""
        key_BSD, value_BSD = self.key_value(x_BSD).chunk(2, dim=-1)
        if real_BS is None:
            return KeyValue(self._split(key_BSD), self._split(value_BSD))
        # A sequence of padding alone attends to its padding, for want of a softmax over nothing, and finds zeros.
        value_BSD = value_BSD * real_BS[:, :, None]
        real_B11S = (real_BS | ~real_BS.any(1, keepdim=True))[:, None, None]
        # Laid out by heads once, not in every application that looks at this memory.
        return KeyValue(self._split(key_BSD).contiguous(), self._split(value_BSD).contiguous(), real_B11S)

    def _split(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _attend(self, query_BHTC: Tensor, to: KeyValue, causal: bool = False) -> Tensor:
        # Padding follows the real ids, so a causal route needs no other mask.
        if query_BHTC.device.type == "cpu" and self.training and self.p:
            # Under dropout torch has no fused kernel there either, and it draws its slow random numbers.
            T = query_BHTC.shape[2]
            mask = torch.ones(T, T, dtype=torch.bool).tril() if causal else to.real_B11S
            attended_BHTC = dropped_attention(query_BHTC, to.key_BHSC, to.value_BHSC, mask, self.p)
            return attended_BHTC.transpose(1, 2).flatten(2)
        if query_BHTC.device.type == "cpu" and query_BHTC.shape[2] == 1 and to.real_B11S is not None:
            # For one query a row, 64 rows, 63 positions of a memory the fused kernel takes 2.3 ms, plain products 0.9.
            score_BHTS = (query_BHTC / math.sqrt(query_BHTC.shape[-1])) @ to.key_BHSC.transpose(-1, -2)
            attended_BHTC = score_BHTS.masked_fill(~to.real_B11S, -torch.inf).softmax(-1) @ to.value_BHSC
            return attended_BHTC.transpose(1, 2).flatten(2)
        attended_BHTC = functional.scaled_dot_product_attention(
            query_BHTC,
            to.key_BHSC,
            to.value_BHSC,
            attn_mask=to.real_B11S,
            dropout_p=self.p if self.training else 0.0,
            is_causal=causal,
        )
        return attended_BHTC.transpose(1, 2).flatten(2)
