"""A batch of examples as tensors: its sequences lie end to end, without padding.

Dimensions, here and in every shape-suffixed name of this package:
    B examples (or sequences), N tokens of all of them end to end, P profiles, M persona words, S and T widths to which
    attention alone pads sequences, D width d_model, E embedding size, H heads, C = D / H, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

IGNORED = -100
"""A target that no loss counts, as in torch: that of tokens which only fill a batch up to a capacity."""


class Block(NamedTuple):
    """Consecutive sequences that attention lays side by side, padded to one width."""

    sequences: int
    tokens: int
    width: int

    @property
    def is_full(self) -> bool:
        """Whether all are of that width, so that tokens end to end are what padded ones are."""
        return self.tokens == self.sequences * self.width


@dataclass(frozen=True, eq=False)
class Sequences:
    """Where the sequences of N tokens lie; made by :meth:`of`. All tensors are int64."""

    offsets: Tensor
    """Where each sequence begins, and at last N: (B + 1,)."""
    sequence_N: Tensor
    """The sequence of each token."""
    position_N: Tensor
    """Its place in that sequence, from 0."""
    slot_N: Tensor
    """Its place in its padded block, whose rows lie end to end."""
    token: Tensor
    """The opposite: for each place of the padded blocks the token in its block, or one past them where there is none.
    """
    blocks: tuple[Block, ...]

    @classmethod
    def of(cls, lengths: Tensor, blocks: Iterable[int] | None = None) -> Self:
        """Sequences of these lengths (B,), in blocks of so many sequences each, or all in one.

        A block is as wide as its longest sequence.
        """
        lengths = lengths.long()
        parts = [part.tolist() for part in lengths.split(list(blocks or ()) or [len(lengths)])]
        found = tuple(Block(len(part), sum(part), max([1, *part])) for part in parts)
        offsets = functional.pad(lengths.cumsum(0), (1, 0))
        sequence_N = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
        position_N = torch.arange(len(sequence_N)) - offsets[sequence_N]
        start_B = torch.tensor([i * block.width for block in found for i in range(block.sequences)], dtype=torch.int64)
        slot_N = start_B[sequence_N] + position_N
        tokens = []
        for block, slot in zip(found, slot_N.split([block.tokens for block in found]), strict=True):
            token = torch.full((block.sequences * block.width,), block.tokens)
            tokens.append(token.index_copy_(0, slot, torch.arange(block.tokens)))
        return cls(offsets, sequence_N, position_N, slot_N, torch.cat(tokens), found)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each sequence, (B,)."""
        return self.offsets.diff()

    @property
    def width(self) -> int:
        """No sequence is longer."""
        return max(block.width for block in self.blocks)

    def sum(self, x_ND: Tensor) -> Tensor:
        """The sum over each sequence's tokens, (N, D) to (B, D); of an empty one 0."""
        return torch.segment_reduce(x_ND, "sum", offsets=self.offsets, axis=0, unsafe=True, initial=0)

    def spread(self, x_BD: Tensor) -> Tensor:
        """What belongs to a sequence, at each of its tokens: (B, D) to (N, D)."""
        return functional.embedding(self.sequence_N, x_BD)

    def softmax(self, score_N: Tensor) -> Tensor:
        """The softmax over each sequence's tokens, (N,) to (N,)."""
        highest_B = torch.segment_reduce(score_N.detach(), "max", offsets=self.offsets, axis=0, unsafe=True)
        weight_N1 = (score_N - highest_B[self.sequence_N]).exp()[:, None]
        return (weight_N1 / self.spread(self.sum(weight_N1))).squeeze(1)

    def pad(self, x: Tensor, dim: int = 0) -> list[Tensor]:
        """The sequences side by side, block by block: (…, N, …) to (…, b, S, …) each, zero where there is no token."""
        tokens = [block.tokens for block in self.blocks]
        padded = []
        for block, part, slot in zip(self.blocks, x.split(tokens, dim), self.slot_N.split(tokens), strict=True):
            rows = part if block.is_full else _scatter(part, dim, slot, block.sequences * block.width)
            padded.append(rows.unflatten(dim, (block.sequences, block.width)))
        return padded

    def pack(self, padded: Iterable[Tensor], dim: int = 0) -> Tensor:
        """What :meth:`pad` was given: (…, b, S, …) of each block to (…, N, …)."""
        places = [block.sequences * block.width for block in self.blocks]
        packed = []
        for block, x, token in zip(self.blocks, padded, self.token.split(places), strict=True):
            rows = x.flatten(dim, dim + 1)
            if not block.is_full:
                # Not a selection of rows: its gradient would be added up row by row, which takes ten times as long.
                rows = _scatter(rows, dim, token, block.tokens + 1).narrow(dim, 0, block.tokens)
            packed.append(rows)
        return torch.cat(packed, dim)

    def to(self, device: torch.device | str) -> Self:
        """The same on another device; copies from pinned memory do not block."""
        return _each(self, lambda tensor: tensor.to(device, non_blocking=True))


def _scatter(x: Tensor, dim: int, place: Tensor, size: int) -> Tensor:
    """Zeros, ``size`` of them along ``dim``, but x at the places."""
    return x.new_zeros(*x.shape[:dim], size, *x.shape[dim + 1 :]).index_copy_(dim, place, x)


class Packed(NamedTuple):
    """Sequences of ids."""

    ids: Tensor
    """(N,) int32 or int64."""
    sequences: Sequences

    @classmethod
    def of(cls, rows: Sequence[Sequence[int]], blocks: Iterable[int] | None = None) -> "Packed":
        """These lists of ids, in blocks of so many lists each, or all in one."""
        ids = torch.tensor([i for row in rows for i in row], dtype=torch.int64)
        return cls(ids, Sequences.of(torch.tensor([len(row) for row in rows], dtype=torch.int64), blocks))

    def to(self, device: torch.device | str) -> "Packed":
        """The same on another device."""
        return Packed(self.ids.to(device, non_blocking=True), self.sequences.to(device))


@dataclass(frozen=True, kw_only=True, eq=False)
class Batch:
    """Examples as integer tensors.

    Persona ids are words of the persona vocabulary for a model with a MemN2N memory, else characters.
    """

    example_id_B: Tensor
    """Stable ids (int64)."""
    context: Packed
    """Context characters; every utterance is followed by [SEP]."""
    speaker_N: Tensor
    """For each context character, which of the batch's profiles speaks."""
    profiles: Packed
    """Gender, place and tags of every profile of the batch, without the keys: P sequences."""
    persona: Packed
    """The responder's persona with its keys: 性别 … 地址 … 兴趣 …"""
    response: Packed
    """[BOS] and the characters of the response."""
    target_N: Tensor
    """What follows each of them: the characters and [EOS]."""
    infilled: Packed | None
    """[BOS] … [EOS] with a span replaced by one [MASK] (auxiliary task "infilling"), else None."""
    persona_related_B: Tensor | None = None
    """r of L_W: 1 where question or response is about the responder's persona, else 0; None where no weight is
    predicted."""

    def to(self, device: torch.device | str) -> Self:
        """The same batch on another device; copies from pinned memory do not block."""
        return _each(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Self:
        """The same batch in pinned memory, which needs a GPU."""
        return _each(self, Tensor.pin_memory)


T = TypeVar("T", bound="Sequences | Batch")


def _each(of: T, change: Callable[[Tensor], Tensor]) -> T:
    """The same with every tensor changed."""
    changed: dict[str, Any] = {}
    for field in fields(of):
        value = getattr(of, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, Packed):
            changed[field.name] = Packed(change(value.ids), _each(value.sequences, change))
    return replace(of, **changed)
