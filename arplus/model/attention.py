"""Attention routing: one query, one set of weights, and up to three routes O_prev, O_C and O_T (Eq. 1 and 2).

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arplus.model.batch import Sequences
from arplus.model.ops import Linear, Module


class KeyValue(NamedTuple):
    """What queries of the same B sequences may look at: keys and values of all heads, and where not to look."""

    key_HBSC: Tensor
    value_HBSC: Tensor
    mask: Tensor | None = None
    """-inf where not to look, else 0: (1, B, 1, S) or (T, S)."""

    def append(self, new: "KeyValue") -> "KeyValue":
        """These positions and then the new ones, all of them visible: the cache of step by step decoding."""
        return KeyValue(torch.cat([self.key_HBSC, new.key_HBSC], 2), torch.cat([self.value_HBSC, new.value_HBSC], 2))

    def weighed(self, by_B: Tensor) -> "KeyValue":
        """The same with all that is found in a sequence times a factor: attention is linear in its values."""
        return self._replace(value_HBSC=self.value_HBSC * by_B.to(self.value_HBSC.dtype)[:, None, None])


Blocks = list[KeyValue]
"""Keys and values of packed sequences, one entry per block of :attr:`Sequences.blocks`."""


class Routes(NamedTuple):
    """What the decoder's routes found."""

    previous_ND: Tensor
    """O_prev, from the sequence to itself."""
    memories: list[Tensor]
    """O_C and O_T, (N, D) each, as far as the model has them."""
    own: Blocks
    """Keys and values of the sequence itself up to here."""


class Projection(Linear):
    """The projections of queries, keys and values, stacked as torch.nn.MultiheadAttention stacks them."""

    def __init__(self, d_model: int) -> None:
        super().__init__(d_model, 3 * d_model)

    def forward(self, x_ND: Tensor, parts: int = 3) -> Tensor:
        """(N, parts · D): the last ``parts`` of the three, so that 2 are the keys and values alone."""
        if parts == 3:
            # Not a slice of all: autocast keeps no bf16 copy of a slice, and its gradient is filled up with zeros.
            return super().forward(x_ND)
        rows = parts * self.in_features
        return self.ops.linear(x_ND, self.weight[-rows:], self.bias[-rows:])


class Attention(Module):
    """Multi-head attention whose weights serve the encoder and every route of the decoder."""

    def __init__(self, d_model: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.p = heads, dropout
        self.query_key_value = Projection(d_model)
        self.output = Linear(d_model, d_model)

    def reset_parameters(self) -> None:
        """Initialises as torch.nn.MultiheadAttention does: Xavier for the stacked (3d, d) matrix, biases zero."""
        for module in (self.query_key_value, self.output):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)

    def forward(self, x_ND: Tensor, of: Sequences) -> Tensor:
        """The encoder's self-attention, (N, D)."""
        query, own = self._project(x_ND, of, _beyond(of))
        return self._look(query, own, of)

    def key_value(self, x_ND: Tensor, of: Sequences, weight_B: Tensor | None = None) -> Blocks:
        """What a decoder may look at of encoded sequences, weighed if wanted; an empty one is found to hold zeros."""
        _, own = self._project(x_ND, of, _beyond(of), parts=2)
        if weight_B is None:
            return own
        weights = weight_B.split([block.sequences for block in of.blocks])
        return [found.weighed(weight) for found, weight in zip(own, weights, strict=True)]

    def routes(self, x_ND: Tensor, of: Sequences, memories: Sequence[Blocks], past: Blocks | None = None) -> Routes:
        """The decoder's routes: from each sequence to itself (causal), and to each memory, all with one query.

        With ``past``, x is the one token that follows it in each sequence.
        """
        query, own = self._project(x_ND, of, _later(of))
        if past is not None:
            own = [before.append(new) for before, new in zip(past, own, strict=True)]
        return Routes(self._look(query, own, of), [self._look(query, memory, of) for memory in memories], own)

    def _project(
        self, x_ND: Tensor, of: Sequences, hidden: Sequence[Tensor], parts: int = 3
    ) -> tuple[list[Tensor], Blocks]:
        """Queries (unless ``parts`` is 2), and keys and values with their masks, block by block."""
        queries: list[Tensor] = []
        own = []
        # Heads first, so that a head's queries, keys and values of a sequence are matrices that lie whole.
        heads_HNC = self.query_key_value(x_ND, parts).unflatten(-1, (parts, self.heads, -1)).movedim(0, 2)
        for block, hide in zip(of.pad(heads_HNC, 2), hidden, strict=True):
            *query, key, value = block.unbind(0)
            queries += query
            own.append(KeyValue(key, value, key.new_zeros(hide.shape).masked_fill(hide, -torch.inf)))
        return queries, own

    def _look(self, query: list[Tensor], to: Blocks, of: Sequences) -> Tensor:
        p = self.p if self.training else 0.0
        found = [self.ops.attend(q, *kv, p) for q, kv in zip(query, to, strict=True)]
        return self.output(of.pack(found, 1).transpose(0, 1).flatten(1))


def _beyond(of: Sequences) -> list[Tensor]:
    """The places past each sequence's end, (1, b, 1, S); of an empty one all but the first, which holds zeros.

    In four dimensions, since torch has fused kernels for masks of two and of four.
    """
    lengths = of.lengths.clamp(min=1).split([block.sequences for block in of.blocks])
    return [
        (torch.arange(block.width, device=part.device) >= part[:, None])[None, :, None]
        for block, part in zip(of.blocks, lengths, strict=True)
    ]


def _later(of: Sequences) -> list[Tensor]:
    """The places after each, (S, S)."""
    device = of.offsets.device
    return [torch.ones(b.width, b.width, dtype=torch.bool, device=device).triu(1) for b in of.blocks]
