"""Attention routing: one query, one set of weights, and up to three routes O_prev, O_C and O_T (Eq. 1 and 2).

Shape suffixes are those of :mod:`arplus.model.batch`; C is the width d / H of one head.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.model.dropped_attention import dropped_attention
from arplus.model.linear import Linear, linear


def leave_cudnn_out() -> None:
    """Has attention on GPUs take torch's own kernels in this process; workers, evaluators and benchmarks begin with it.

    From sm_90 on torch prefers cuDNN's. Some of them round a dropout of 0.1 to sixteenths (pytorch/pytorch#174245), and
    without dropout they make a plan for every shape, about 30 ms each.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)


class KeyValue(NamedTuple):
    """What can be attended to: keys and values of all heads."""

    key_BHSC: Tensor
    value_BHSC: Tensor
    mask: Tensor | None = None
    """Where to look (B, 1, 1, S), True at what is real, or what is added to the scores; None: everywhere."""

    def followed_by(self, new: "KeyValue") -> "KeyValue":
        """These positions and then the new ones: the cache of step by step decoding."""
        return KeyValue(torch.cat([self.key_BHSC, new.key_BHSC], 2), torch.cat([self.value_BHSC, new.value_BHSC], 2))

    def for_steps(self) -> "KeyValue":
        """A memory laid out in the CPU's memory as one query at a time reads it, in each step and layer again."""
        if self.key_BHSC.device.type != "cpu" or self.mask is None:
            return self
        key_BHCS = self.key_BHSC.transpose(-1, -2).contiguous()
        added_B11S = torch.zeros(self.mask.shape, dtype=key_BHCS.dtype).masked_fill_(~self.mask, -torch.inf)
        added_BH1S = added_B11S.expand(-1, key_BHCS.shape[1], -1, -1).contiguous()
        return KeyValue(key_BHCS.transpose(-1, -2), self.value_BHSC, added_BH1S)


class Routes(NamedTuple):
    """What the decoder's routes found."""

    merged_BTD: Tensor
    """The heads of O_merge = O_T + O_C + O_prev (Eq. 2), or of as many as the model has; the output projection is
    still to come."""
    memories_BTD: Tensor | None
    """Those of O_T + O_C alone; None where only O_prev exists."""
    own: KeyValue
    """Keys and values of the sequence itself up to here."""


class QueryKeyValue(Linear):
    """The projections of queries, keys and values, stacked as torch.nn.MultiheadAttention stacks them."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 3 * d_model)

    def forward(self, x_BSD: Tensor, parts: int = 3) -> Tensor:
        """(B, S, parts · D): the last ``parts`` of the three, so that 2 are the keys and values alone."""
        if parts == 3:
            # Not a slice of all: autocast keeps no bf16 copy of a slice, and its gradient is filled up with zeros.
            return linear(x_BSD, self.weight, self.bias)
        rows = parts * self.in_features
        return linear(x_BSD, self.weight[-rows:], self.bias[-rows:])


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
        self.query_key_value = QueryKeyValue(d_model)
        self.output = RouteOutput(d_model, d_model)

    def reset_parameters(self) -> None:
        """Initialises as torch.nn.MultiheadAttention does: Xavier for the stacked (3d, d) matrix, biases zero."""
        for module in (self.query_key_value, self.output):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x_BSD: Tensor, real_BS: Tensor) -> Tensor:
        """The encoder's self-attention."""
        query_BHSC, key_BHSC, value_BHSC = self._project(x_BSD)
        return self.output(self._attend(query_BHSC, KeyValue(key_BHSC, value_BHSC, _visible(real_BS))))

    def routes(self, x_BTD: Tensor, memories: Sequence[KeyValue], past: KeyValue | None = None) -> Routes:
        """The decoder's routes: from x to itself (causal), and to each memory, all with one query.

        With ``past``, x is the one position that follows it. The routes are summed before the output projection.
        """
        query_BHTC, *key_value_BHTC = self._project(x_BTD)
        own = KeyValue(*key_value_BHTC)
        if past is not None:
            assert x_BTD.shape[1] == 1, "cached decoding goes one position at a time"
            own = past.followed_by(own)
        heads_BTD = self._attend(query_BHTC, own, causal=past is None)
        if not memories:
            return Routes(heads_BTD, None, own)
        memories_BTD = functools.reduce(torch.add, (self._attend(query_BHTC, memory) for memory in memories))
        return Routes(heads_BTD + memories_BTD, memories_BTD, own)

    def memory(self, x_BSD: Tensor, real_BS: Tensor) -> KeyValue:
        """What a decoder attends to of an encoded sequence; the same in every application of a shared layer.

        A sequence of padding alone is found to hold zeros.
        """
        key_BHSC, value_BHSC = self._project(x_BSD, 2)
        value_BHSC = value_BHSC * real_BS[:, None, :, None]
        # Laid out by heads once, not in every application that looks at this memory.
        return KeyValue(key_BHSC.contiguous(), value_BHSC.contiguous(), _visible(real_BS))

    def _project(self, x_BSD: Tensor, parts: int = 3) -> tuple[Tensor, ...]:
        split_BSPHC = self.query_key_value(x_BSD, parts).unflatten(-1, (parts, self.heads, -1))
        return split_BSPHC.permute(2, 0, 3, 1, 4).unbind(0)

    def _attend(self, query_BHTC: Tensor, to: KeyValue, causal: bool = False) -> Tensor:
        # Padding follows the real ids, so a causal route needs no other mask.
        T, on_cpu = query_BHTC.shape[2], query_BHTC.device.type == "cpu"
        if on_cpu and self.training and self.p:
            # Under dropout torch has no fused kernel there either, and it draws its slow random numbers.
            mask = torch.ones(T, T, dtype=torch.bool).tril() if causal else to.mask
            attended_BHTC = dropped_attention(query_BHTC, to.key_BHSC, to.value_BHSC, mask, self.p)
        elif on_cpu and T == 1 and to.mask is not None and to.mask.is_floating_point():
            attended_BHTC = _look_up(query_BHTC, to.key_BHSC, to.value_BHSC, to.mask)
        else:
            attended_BHTC = functional.scaled_dot_product_attention(
                query_BHTC,
                to.key_BHSC,
                to.value_BHSC,
                attn_mask=to.mask,
                dropout_p=self.p if self.training else 0.0,
                is_causal=causal,
            )
        return attended_BHTC.transpose(1, 2).flatten(2)


def _look_up(query_BH1C: Tensor, key_BHSC: Tensor, value_BHSC: Tensor, added_BH1S: Tensor) -> Tensor:
    # For one query a row, 64 rows, 63 positions of a memory the fused kernel takes 2.3 ms, plain products 0.8.
    query, key, value, added = (t.flatten(0, 1) for t in (query_BH1C, key_BHSC, value_BHSC, added_BH1S))
    score = torch.baddbmm(added, query, key.transpose(1, 2), alpha=1 / math.sqrt(query.shape[-1]))
    return (score.softmax(-1) @ value).view(query_BH1C.shape)


def _visible(real_BS: Tensor) -> Tensor:
    """Where to look, (B, 1, 1, S): at what is real, or everywhere for want of a softmax over nothing."""
    return (real_BS | ~real_BS.any(1, keepdim=True))[:, None, None]
