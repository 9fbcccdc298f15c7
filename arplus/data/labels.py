"""Whether an example is about the responder's persona: r, which the weight predictor learns (Eq. 3), by simple rules.

The rules that made the labels of Zheng et al. (2020) are not published. In plain Python ours take 10 to 50 µs an
example, as much as the whole preparation; so Arrow and NumPy find the few examples of which one may be true.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from arplus.data.personas import MAY_CLAIM, PERSONA_QUESTION, Persona, contradicts, split_place
from arplus.data.ragged import Int64, Lists, offsets
from arplus.data.sessions import code_points

RULES = {
    "asked": "the last utterance asks for place, gender or hobby",
    "claimed": "the reply says of its speaker a gender or a place",
    "named": "the reply names the responder's place, or a tag of two or more characters",
}
"""Every rule, in the order in which they are tried, in words."""


def rules_of(questions: pa.Array, replies: pa.Array, profiles: Lists, items: Sequence[str]) -> NDArray[np.int8]:
    """For each example the first of :data:`RULES` that is true, numbered from 1; 0 where none is.

    Questions and replies are without white space, and no reply is empty. ``profiles`` are the responders', as indices
    into ``items``: gender, place, tags.
    """
    rule = _holds(questions, PERSONA_QUESTION).astype(np.int8)
    for number, candidates, is_true in (
        (2, _holds(replies, MAY_CLAIM), _claims),
        (3, _may_name(replies, profiles, items), _names),
    ):
        rows = np.flatnonzero(candidates & (rule == 0))
        pairs = zip(replies.take(pa.array(rows)).to_pylist(), _personas(profiles, items, rows), strict=True)
        rule[rows] = [number * is_true(reply, persona) for reply, persona in pairs]
    return rule


def _holds(texts: pa.Array, pattern: str) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = pc.match_substring_regex(texts, pattern).to_numpy(zero_copy_only=False)
    return found


def _claims(reply: str, persona: Persona) -> bool:
    return contradicts(reply, persona) is not None


def _names(reply: str, persona: Persona) -> bool:
    tags = (tag for tag in persona.tags if len(tag) > 1)
    return any(part in reply for part in (*split_place(persona.location), *tags) if part)


def _personas(profiles: Lists, items: Sequence[str], rows: Int64) -> Iterator[Persona]:
    starts = offsets(profiles.lengths)
    for start, end in zip(starts[rows].tolist(), starts[rows + 1].tolist(), strict=True):
        gender, place, *tags = [items[i] for i in profiles.values[start:end].tolist()]
        yield Persona(gender, place, tuple(tags))


def _may_name(replies: pa.Array, profiles: Lists, items: Sequence[str]) -> NDArray[np.bool_]:
    """Whether a reply has, as far as 64 bits tell, all characters of a part of the place or of a tag."""
    if not len(replies):
        return np.zeros(0, bool)
    starts = offsets(profiles.lengths)[:-1]
    places = profiles.values[starts + 1]
    of_item = _bits(items)
    parts = np.zeros((2, len(items)), np.uint64)
    known = np.unique(places)
    for part, names in zip(parts, zip(*(split_place(items[i]) for i in known), strict=True), strict=True):
        part[known] = _bits(names)
    wanted = of_item[profiles.values]
    wanted[starts], wanted[starts + 1] = parts[:, places]
    missing = wanted & ~np.repeat(_bits(replies), profiles.lengths)
    return np.logical_or.reduceat((missing == 0) & (wanted != 0), starts)


def _bits(texts: pa.Array | Sequence[str]) -> NDArray[np.uint64]:
    """The characters of each text as a set of 64 bits, 0 for an empty one."""
    points, starts = code_points(texts if isinstance(texts, pa.Array) else pa.array(texts, pa.string()))
    bit = np.uint64(1) << ((points * np.uint32(2654435769)) >> np.uint32(26)).astype(np.uint64)
    found = np.bitwise_or.reduceat(np.append(bit, np.uint64(0)), starts[:-1])
    return np.where(np.diff(starts) > 0, found, np.uint64(0))
