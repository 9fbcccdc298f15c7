"""Fills batches up to one fixed shape, for compiled steps (CUDA graphs).

Sequences are packed, so that the shapes of a batch are its numbers of tokens. These differ little between large random
batches: filled up with tokens that count nowhere, all but one in a thousand fit a capacity of their mean and three
standard deviations, and the others the next one.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from arplus.config import ExampleRules
from arplus.model.batch import IGNORED, Batch, Block, Packed, Sequences

MULTIPLE = 64
"""Capacities are multiples of it."""
GROWTH = 1.25
"""Each capacity is so many times the one before."""


class Capacity(NamedTuple):
    """What a batch may hold: tokens, profiles, and how long a persona may be."""

    context: int
    profiles: int
    profile_tokens: int
    persona: int
    persona_width: int
    response: int
    infilled: int

    @classmethod
    def needed(cls, batch: Batch) -> "Capacity":
        """What a batch takes."""
        return cls(
            context=len(batch.context.ids),
            profiles=len(batch.profiles.sequences),
            profile_tokens=len(batch.profiles.ids),
            persona=len(batch.persona.ids),
            persona_width=max(batch.persona.sequences.width, batch.profiles.sequences.width),
            response=len(batch.response.ids),
            infilled=0 if batch.infilled is None else len(batch.infilled.ids),
        )

    @classmethod
    def of(cls, batches: Sequence[Batch]) -> "Capacity":
        """The first capacity for batches such as these."""
        needed = torch.tensor([cls.needed(batch) for batch in batches], dtype=torch.float64)
        enough = needed.mean(0) + 3 * needed.std(0, correction=0)
        return cls(*map(_rounded, enough.tolist()))

    def holds(self, batch: Batch) -> bool:
        """Whether the batch fits."""
        return all(have >= need for have, need in zip(self, self.needed(batch), strict=True))

    def grown(self) -> "Capacity":
        """The next capacity."""
        return Capacity(*(_rounded(GROWTH * n) for n in self))


class Filler:
    """Fills a run's micro-batches up, each to the first capacity that holds it; those that come first say to which."""

    def __init__(self, rules: ExampleRules, examples: int) -> None:
        self.rules = rules
        self.examples = examples
        """Most examples of a micro-batch."""
        self.capacities: list[Capacity] = []

    def __call__(self, batches: Sequence[Batch], *, pin: bool = False) -> list[Batch]:
        """The batches filled up, in pinned memory if wanted."""
        if not self.capacities:
            self.capacities.append(Capacity.of(batches))
        filled = [self._filled(batch) for batch in batches]
        return [batch.pinned() for batch in filled] if pin else filled

    def _filled(self, batch: Batch) -> Batch:
        while not self.capacities[-1].holds(batch):
            self.capacities.append(self.capacities[-1].grown())
        capacity = next(capacity for capacity in self.capacities if capacity.holds(batch))
        return fill(batch, capacity, self.examples, self.rules)


def fill(batch: Batch, capacity: Capacity, examples: int, rules: ExampleRules) -> Batch:
    """A batch as so many examples and one that holds the tokens which fill it up to a capacity; its losses stay."""
    e, r = examples, rules.max_response_ids
    infilled = batch.infilled and _fill(batch.infilled, e, capacity.infilled, r)
    labels_B = batch.persona_related_B
    return replace(
        batch,
        context=_fill(batch.context, e, capacity.context, rules.max_context_ids),
        speaker_N=_pad(batch.speaker_N, capacity.context, capacity.profiles),
        profiles=_fill(batch.profiles, capacity.profiles, capacity.profile_tokens, capacity.persona_width),
        persona=_fill(batch.persona, e, capacity.persona, capacity.persona_width),
        response=_fill(batch.response, e, capacity.response, r),
        target_N=_pad(batch.target_N, capacity.response, IGNORED),
        infilled=infilled,
        persona_related_B=None if labels_B is None else _pad(labels_B, e + 1, IGNORED),
    )


def _fill(packed: Packed, sequences: int, tokens: int, width: int) -> Packed:
    """As many sequences, some of them empty, and a last one that holds the other tokens.

    In the block that attention sees all of these have one place, and what it finds there they do not get: they are not
    a sequence that a kernel would have to be wide enough for.
    """
    of, n = packed.sequences, len(packed.ids)
    place_N = of.sequence_N * width + of.position_N
    token = torch.full(((sequences + 1) * width,), tokens)
    token[place_N] = torch.arange(n)
    filled = Sequences(
        offsets=torch.cat([of.offsets, torch.full((sequences - len(of),), n), torch.tensor([tokens])]),
        sequence_N=_pad(of.sequence_N, tokens, sequences),
        position_N=_pad(of.position_N, tokens, 0),
        slot_N=_pad(place_N, tokens, sequences * width),
        token=token,
        blocks=(Block(sequences + 1, tokens, width),),
    )
    return Packed(_pad(packed.ids, tokens, 0), filled)


def _pad(of_N: Tensor, tokens: int, value: int) -> Tensor:
    return functional.pad(of_N, (0, tokens - len(of_N)), value=value)


def _rounded(n: float) -> int:
    return MULTIPLE * max(math.ceil(n / MULTIPLE), 1)  # never none, which would not grow
