"""Session → examples: paired, cut and encoded by the paper's rules, a whole table at once and without a Python loop.

The utterances of a session are paired (0, 1), (2, 3), …; an odd last one is dropped. Each pair is an example: its
second utterance is the response, and the context is everything up to the first, at most its last utterances, seven by
default. Utterances are cut, by default to 15 characters, and each one of the context is followed by [SEP]
(:class:`arplus.config.ExampleRules`). A session that ends with a test record's reference reply is one example, whose
response is that reply, however many utterances come before it.

An utterance that is empty after normalisation keeps its place as a turn, so that the pairing does not shift. But an
example with an empty response, or without a character in its whole context, is not one (`empty_response`,
`empty_context`); nor, if so chosen, is one in which a speaker lacks gender or location (`incomplete_persona`).
"""

from collections import Counter
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from arplus.config import ExampleRules
from arplus.data.hashes import example_ids, hash_words
from arplus.data.labels import RULES, rules_of
from arplus.data.ragged import Int64, Lists, Ragged, flat, list_lengths, offsets, ranges
from arplus.data.sessions import code_points
from arplus.text import PERSONA_KEYS, Vocabulary

LIST_COLUMNS = (
    "context",
    "speakers",
    "response",
    "profile_words",
    "profile_word_counts",
    "profile_characters",
    "profile_character_counts",
    "target_words",
    "target_characters",
)

LEFT_OUT = {
    "empty_response": "the reply has no character",
    "empty_context": "nothing is said before the reply",
    "incomplete_persona": "a speaker lacks gender or location; --incomplete-personas keep takes these",
}
"""Every reason for which a pair of utterances is not an example, in words."""

SCHEMA = pa.schema(
    [
        ("example_id", pa.int64()),
        *((name, pa.list_(pa.int32())) for name in LIST_COLUMNS),
        ("persona_related", pa.bool_()),
    ]
)
"""One row per example. Ids of characters unless said otherwise; "local" profiles are those of this example: 0 is the
responder, then the speakers of the context in order of appearance.

- ``example_id``: stable, non-negative: from the session's hash and the position of the response
- ``context``: the last utterances, each cut and followed by [SEP]
- ``speakers``: for each utterance of the context, the local profile that speaks
- ``response``: without [BOS] and [EOS]
- ``profile_words``: persona word ids of gender, place and tags of local profile 0, then of profile 1, …; no keys, a
  missing item is one [UNK]
- ``profile_word_counts``: how many of them belong to each local profile
- ``profile_characters``, ``profile_character_counts``: the same items, as characters
- ``target_words``: 性别 gender 地址 place 兴趣 tag tag … of the responder, as persona word ids
- ``target_characters``: the same, as characters
- ``persona_related``: whether one of :data:`arplus.data.labels.RULES` is true; data sets of before lack it
"""


@dataclass
class Encoded:
    """The examples of a table of sessions."""

    table: pa.Table
    """:data:`SCHEMA`, in order of sessions."""
    session: Int64
    """For each example the row of its session."""
    left_out: dict[str, Int64]
    """By reason, the rows of the sessions whose pairs are not examples; a row may be there several times."""
    rule: NDArray[np.int8]
    """For each example the first of :data:`arplus.data.labels.RULES` that is true, from 1, or 0."""

    def left_out_of(self, split: NDArray[np.integer]) -> dict[int, Counter[str]]:
        """Pairs that are not examples by split and reason, given the split of each session."""
        counts: dict[int, Counter[str]] = {}
        for reason, sessions in self.left_out.items():
            for i, n in enumerate(np.bincount(split[sessions]).tolist()):
                counts.setdefault(i, Counter())[reason] += n
        return counts

    def persona_related_of(self, split: NDArray[np.integer]) -> dict[int, Counter[str]]:
        """Examples about the persona by split and rule, given the split of each session."""
        n = 1 + len(RULES)
        place = split[self.session].astype(np.int64) * n + self.rule
        counts = np.bincount(place, minlength=n * (1 + int(split.max(initial=-1)))).reshape(-1, n)
        return {i: Counter(dict(zip(RULES, part[1:], strict=True))) for i, part in enumerate(counts.tolist())}


def encode_sessions(
    sessions: pa.Table,
    characters: Vocabulary,
    persona_words: Vocabulary,
    rules: ExampleRules,
) -> Encoded:
    """All examples of the sessions (:data:`arplus.data.sessions.SCHEMA`)."""
    sessions = sessions.combine_chunks()
    dialogues = _Dialogues(sessions, characters, rules.max_utterance_characters)
    personas = _Personas(sessions, characters, persona_words)
    pairs = _pairs(dialogues, flat(sessions["has_reference"]).to_numpy(zero_copy_only=False), rules)
    keep, left_out = _sorted_out(pairs, dialogues, personas, rules)
    pairs = _Pairs(*(column[keep] for column in pairs))
    local, new = _local_profiles(pairs.part)
    place = np.arange(pairs.part.shape[1])
    spoken = (place >= 1) & (place <= pairs.turns[:, None])
    columns = {
        "context": dialogues.joined(pairs.response - pairs.turns, pairs.turns),
        "speakers": Lists(local[spoken], pairs.turns),
        "response": dialogues.texts.take(pairs.response),
        **personas.columns(pairs.part[new], new.sum(1), pairs.part[:, 0]),
    }
    ids = example_ids(hash_words(sessions["key"])[pairs.session], pairs.position)
    questions, replies = (dialogues.cut(which) for which in (pairs.response - 1, pairs.response))
    rule = rules_of(questions, replies, personas.items.take(pairs.part[:, 0]), personas.known)
    arrays = [pa.array(ids), *(columns[name].to_arrow() for name in LIST_COLUMNS), pa.array(rule > 0)]
    return Encoded(pa.Table.from_arrays(arrays, schema=SCHEMA), pairs.session, left_out, rule)


class _Pairs(NamedTuple):
    """Pairs of utterances, each of which may be an example."""

    session: Int64
    """The row of its session."""
    position: Int64
    """Which utterance of its session the response is."""
    response: Int64
    """Which one of all utterances."""
    turns: Int64
    """How many utterances before it are its context."""
    part: Int64
    """Profiles that take part: the responder's, then that of each utterance of the context, then -1."""


def _pairs(dialogues: "_Dialogues", has_reference: NDArray[np.bool_], rules: ExampleRules) -> _Pairs:
    counts = dialogues.counts
    pairs = np.where(has_reference, 1, counts // 2)
    session = np.repeat(np.arange(len(counts)), pairs)
    position = 2 * ranges(np.zeros_like(pairs), pairs) + 1
    position = np.where(has_reference[session], counts[session] - 1, position)
    response = offsets(counts)[session] + position
    turns = np.minimum(position, rules.max_context_utterances)
    # Columns are few, rows are many.
    part = np.full((len(session), 1 + int(turns.max(initial=0))), -1)
    part[:, 0] = dialogues.speaker[response]
    row, column = np.repeat(np.arange(len(session)), turns), 1 + ranges(np.zeros_like(turns), turns)
    part[row, column] = dialogues.speaker[ranges(response - turns, turns)]
    return _Pairs(session, position, response, turns, part)


def _sorted_out(
    pairs: _Pairs, dialogues: "_Dialogues", personas: "_Personas", rules: ExampleRules
) -> tuple[NDArray[np.bool_], dict[str, Int64]]:
    """Which pairs are examples; and of the others, by the first reason why not, the sessions."""
    length = dialogues.texts.lengths
    before = offsets(length)
    found = {
        "empty_response": length[pairs.response] == 0,
        "empty_context": before[pairs.response] == before[pairs.response - pairs.turns],
        "incomplete_persona": (personas.incomplete[pairs.part] & (pairs.part >= 0)).any(1),
    }
    if rules.incomplete_personas == "keep":
        found["incomplete_persona"][:] = False
    keep, left_out = np.ones(len(pairs.session), bool), {}
    for reason, holds in found.items():
        left_out[reason] = pairs.session[keep & holds]
        keep &= ~holds
    return keep, left_out


def _local_profiles(part: Int64) -> tuple[Int64, NDArray[np.bool_]]:
    """The number of each profile among those of its pair, in order of appearance; and where one appears first."""
    places = range(part.shape[1])
    earliest = np.stack([(part == part[:, j : j + 1]).argmax(1) for j in places], 1)
    new = (earliest == np.arange(len(places))) & (part >= 0)
    return np.take_along_axis(new.cumsum(1) - 1, earliest, 1), new


class _Dialogues:
    """The utterances of all sessions in a row as character ids, each cut, and followed by [SEP]."""

    def __init__(self, sessions: pa.Table, characters: Vocabulary, max_characters: int):
        utterances, profiles = flat(sessions["utterances"]), list_lengths(flat(sessions["profiles"]))
        self.counts = list_lengths(utterances)
        """Utterances of each session."""
        self.speaker = np.repeat(offsets(profiles)[:-1], self.counts) + Ragged.of(sessions["speakers"]).values
        """Of each utterance, among all profiles."""
        self._utterances, self._longest = utterances.flatten(), max_characters
        points, starts = code_points(self._utterances)
        kept = np.minimum(np.diff(starts), max_characters)
        at = offsets(kept + 1)
        ids = np.full(at[-1], characters.special.sep, np.int32)
        ids[ranges(at[:-1], kept)] = characters.by_code_point[points[ranges(starts[:-1], kept)]]
        self.texts = Ragged(ids, at[:-1], kept)
        """The utterances without [SEP]."""

    def cut(self, which: Int64) -> pa.Array:
        """These utterances as text."""
        return pc.utf8_slice_codeunits(self._utterances.take(pa.array(which)), 0, self._longest)

    def joined(self, first: Int64, counts: Int64) -> Lists:
        """So many utterances from each of the first ones on, with their [SEP], as one list each."""
        starts = self.texts.starts[first]
        last = first + counts - 1
        lengths = self.texts.starts[last] + self.texts.lengths[last] + 1 - starts
        return Lists(self.texts.values[ranges(starts, lengths)], lengths)


class _Personas:
    """The profiles of all sessions, numbered in a row, as words and as characters."""

    def __init__(self, sessions: pa.Table, characters: Vocabulary, persona_words: Vocabulary):
        profiles = flat(sessions["profiles"]).flatten()
        lengths = list_lengths(profiles)
        starts = offsets(lengths)[:-1]
        items = flat(pc.dictionary_encode(profiles.flatten()))
        codes = items.indices.to_numpy().astype(np.int64)
        # The item codes go on with the three keys; an empty string is a missing item.
        known = [*items.dictionary.to_pylist(), *PERSONA_KEYS, ""]
        self.known = known
        """Every item that there is."""
        self.items = Ragged(codes, starts, lengths)
        """Gender, place and tags of each profile, as indices of these."""
        missing = len(known) - 1
        empty = np.array([not item for item in known])
        self._word = np.where(empty, persona_words.special.unk, persona_words.encode(known))
        points, ends = code_points(pa.array([item or "?" for item in known]))
        letters = characters.by_code_point[points]
        letters[ends[:-1][empty]] = characters.special.unk
        self._letters = Ragged.end_to_end(letters, np.diff(ends))

        self.incomplete = empty[codes[starts]] | empty[codes[starts + 1]] if len(starts) else np.zeros(1, bool)
        """For each profile whether it lacks gender or place."""
        tags = lengths - 2
        # Without keys: gender, place, tags. With keys: 性别 gender 地址 place 兴趣 tags. No tag is one missing item.
        self._plain, self._keyed = (
            Ragged.end_to_end(np.full((fixed + np.maximum(tags, 1)).sum(), missing), fixed + np.maximum(tags, 1))
            for fixed in (2, 5)
        )
        plain, keyed = self._plain.starts, self._keyed.starts
        for position, key in zip((0, 2, 4), range(missing - 3, missing), strict=True):
            self._keyed.values[keyed + position] = key
        for position in (0, 1):
            item = codes[starts + position]
            self._plain.values[plain + position] = self._keyed.values[keyed + 1 + 2 * position] = item
        for form, first in ((self._plain, plain + 2), (self._keyed, keyed + 5)):
            form.values[ranges(first, tags)] = codes[ranges(starts + 2, tags)]

    def columns(self, profiles: Int64, profile_counts: Int64, responder: Int64) -> dict[str, Lists]:
        """The persona columns of examples with these profiles (flat, so many per example) and these responders."""
        items, target = self._plain.take(profiles), self._keyed.take(responder)
        words = Lists(self._word[items.values], items.lengths)
        letters = self._letters.take(items.values).joined(items.lengths)
        return {
            "profile_words": words.joined(profile_counts),
            "profile_word_counts": Lists(words.lengths, profile_counts),
            "profile_characters": letters.joined(profile_counts),
            "profile_character_counts": Lists(letters.lengths, profile_counts),
            "target_words": Lists(self._word[target.values], target.lengths),
            "target_characters": self._letters.take(target.values).joined(target.lengths),
        }
