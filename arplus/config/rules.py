"""The rules by which sessions become examples: what of an utterance and a context is kept, and which are dropped.

:mod:`arplus.data.examples` applies them.
"""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from annotated_types import Gt, Le

LARGEST_RULE = 1_000_000
"""Utterances, and characters of one: more is a slip of the hand, and at some point beyond what arrays can count."""


@dataclass(frozen=True, kw_only=True)
class ExampleRules:
    """How sessions become examples. ``jobs/prepare.py`` decides it; the data set and every checkpoint carry it."""

    max_utterance_characters: Annotated[int, Gt(0), Le(LARGEST_RULE)] = 15
    """Characters kept of an utterance, and so of a response. Models trained on the data reply with at most as many."""
    max_context_utterances: Annotated[int, Gt(0), Le(LARGEST_RULE)] = 7
    """Utterances kept of a context. 7 are three turns of two, and the question."""
    incomplete_personas: Literal["drop", "keep"] = "drop"
    """What to do with an example in which a speaker lacks gender or location."""

    @property
    def max_context_ids(self) -> int:
        """Ids of the longest context: every utterance is followed by [SEP]."""
        return self.max_context_utterances * (self.max_utterance_characters + 1)

    @property
    def max_response_ids(self) -> int:
        """Ids of the longest response, [BOS] and [EOS] included."""
        return self.max_utterance_characters + 2

    def differences(self, other: "ExampleRules") -> list[str]:
        """What differs in ``other``, a line for each rule: its name, the value here and the value there."""
        pairs = ((f.name, getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return [f"{name} {mine}, not {theirs}" for name, mine, theirs in pairs if mine != theirs]
