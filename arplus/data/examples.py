"""Session → examples by the paper's rules, encoded, for a whole table of sessions at once and without a Python loop.

The utterances of a session are paired (0, 1), (2, 3), …; an odd last one is dropped. Each pair is an example: its
second utterance is the response, and the context is everything up to the first, at most its last utterances, seven by
default. Utterances are cut, by default to 15 characters, and each one of the context is followed by [SEP]
(:class:`arplus.config.ExampleRules`). A session that ends with a test record's reference reply is one example, whose
response is that reply, however many utterances come before it.

An utterance that is empty after normalisation keeps its place as a turn, so that the pairing does not shift. But an
example with an empty response, or with no character in its whole context, is none (`empty_response`,
`empty_context`); nor, if so chosen, is one in which a speaker lacks gender or location (`incomplete_persona`).
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from arplus.config import ExampleRules
from arplus.data.sessions import code_points, hash_words
from arplus.prepare.duplicates import example_ids
from arplus.text import PERSONA_KEYS, Vocabulary

Ints = NDArray[np.int64]

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
"""Every reason for which a pair of utterances is no example, in words."""

SCHEMA = pa.schema([("example_id", pa.int64()), *((name, pa.list_(pa.int32())) for name in LIST_COLUMNS)])
"""One row an example. Ids of characters unless said otherwise; "local" profiles are those of this example: 0 is the
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
"""


@dataclass
class Encoded:
    """The examples of a table of sessions."""

    table: pa.Table
    """:data:`SCHEMA`, in order of sessions."""
    session: Ints
    """For each example the row of its session."""
    left_out: dict[str, Ints]
    """By reason, the rows of the sessions whose pairs are no example; a row may be there several times."""

    def left_out_of(self, split: NDArray[np.integer]) -> dict[int, Counter[str]]:
        """Pairs that are no example by split and reason, given the split of each session."""
        counts: dict[int, Counter[str]] = {}
        for reason, sessions in self.left_out.items():
            for i, n in enumerate(np.bincount(split[sessions]).tolist()):
                counts.setdefault(i, Counter())[reason] += n
        return counts


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

    has_reference = _column(sessions, "has_reference").to_numpy(zero_copy_only=False)
    pairs = np.where(has_reference, 1, dialogues.counts // 2)
    session = np.repeat(np.arange(len(sessions)), pairs)
    response_index = 2 * ranges(np.zeros(len(sessions), np.int64), pairs) + 1
    response_index = np.where(has_reference[session], dialogues.counts[session] - 1, response_index)
    response = dialogues.first[session] + response_index
    context_turns = np.minimum(response_index, rules.max_context_utterances)
    context = response - context_turns

    # Who takes part: the responder, then each utterance's speaker. Columns are few, rows are many.
    width = 1 + int(context_turns.max(initial=0))
    part = np.full((len(session), width), -1)
    part[:, 0] = dialogues.speaker[response]
    row = np.repeat(np.arange(len(session)), context_turns)
    column = 1 + ranges(np.zeros(len(session), np.int64), context_turns)
    part[row, column] = dialogues.speaker[ranges(context, context_turns)]
    earliest = np.stack([(part == part[:, j : j + 1]).argmax(1) for j in range(width)], 1)
    new = (earliest == np.arange(width)) & (part >= 0)
    local = np.take_along_axis(new.cumsum(1) - 1, earliest, 1)

    characters_of = dialogues.offsets[1:] - dialogues.offsets[:-1] - 1
    empty_response = characters_of[response] == 0
    empty_context = dialogues.offsets[response] - dialogues.offsets[context] == context_turns
    incomplete = (personas.incomplete[part] & (part >= 0)).any(1)
    if rules.incomplete_personas == "keep":
        incomplete[:] = False
    left_out = {
        "empty_response": session[empty_response],
        "empty_context": session[empty_context & ~empty_response],
        "incomplete_persona": session[incomplete & ~empty_context & ~empty_response],
    }

    keep = ~(empty_response | empty_context | incomplete)
    session, response, context = session[keep], response[keep], context[keep]
    new, local, part = new[keep], local[keep], part[keep]
    context_turns, response_index = context_turns[keep], response_index[keep]
    taking_part, profile_counts = part[new], new.sum(1)
    spoken = (np.arange(width) >= 1) & (np.arange(width) <= context_turns[:, None])
    responder = part[:, 0]

    columns = {
        "context": dialogues.slices(context, response),
        "speakers": _lists(local[spoken], context_turns),
        "response": dialogues.slices(response, response + 1, drop_last=1),
        **personas.columns(taking_part, profile_counts, responder),
    }
    ids = example_ids(hash_words(sessions["key"])[session], response_index)
    table = pa.Table.from_arrays([pa.array(ids), *(columns[name] for name in LIST_COLUMNS)], schema=SCHEMA)
    return Encoded(table, session, left_out)


def ranges(starts: Ints, lengths: Ints) -> Ints:
    """The indices start, start + 1, … start + length - 1 of every row, one row after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(starts - (ends - lengths), lengths)


class _Dialogues:
    """The utterances of all sessions as one row of character ids, each cut and followed by [SEP]."""

    def __init__(self, sessions: pa.Table, characters: Vocabulary, max_characters: int):
        utterances = _column(sessions, "utterances")
        self.counts = _lengths(utterances)
        self.first = np.cumsum(self.counts) - self.counts
        profiles = _lengths(_column(sessions, "profiles"))
        first_profile = np.repeat(np.cumsum(profiles) - profiles, self.counts)
        self.speaker = first_profile + _column(sessions, "speakers").flatten().to_numpy()
        points, starts = code_points(utterances.flatten())
        kept = np.minimum(starts[1:] - starts[:-1], max_characters)
        self.offsets = _offsets(kept + 1)
        self.ids = np.full(self.offsets[-1], characters.special.sep, np.int32)
        self.ids[ranges(self.offsets[:-1], kept)] = characters.by_code_point[points[ranges(starts[:-1], kept)]]

    def slices(self, first: Ints, end: Ints, drop_last: int = 0) -> pa.Array:
        """The ids of the utterances first … end - 1 of each row, less the last few ids of each row."""
        starts = self.offsets[first]
        lengths = self.offsets[end] - starts - drop_last
        return _lists(self.ids[ranges(starts, lengths)], lengths)


class _Personas:
    """The profiles of all sessions, numbered in a row, as words and as characters."""

    def __init__(self, sessions: pa.Table, characters: Vocabulary, persona_words: Vocabulary):
        profiles = _column(sessions, "profiles").flatten()
        lengths = _lengths(profiles)
        starts = np.cumsum(lengths) - lengths
        items = pc.dictionary_encode(profiles.flatten())
        if isinstance(items, pa.ChunkedArray):
            items = items.combine_chunks()
        codes = items.indices.to_numpy().astype(np.int64)
        # The item codes go on with the three keys; an empty string is a missing item.
        known = [*items.dictionary.to_pylist(), *PERSONA_KEYS, ""]
        missing = len(known) - 1
        empty = np.array([not item for item in known])
        self._word = np.where(empty, persona_words.special.unk, persona_words.encode(known))
        points, offsets = code_points(pa.array([item or "?" for item in known]))
        self._letters = characters.by_code_point[points]
        self._letters[offsets[:-1][empty]] = characters.special.unk
        self._letter_start, self._letter_count = offsets[:-1], offsets[1:] - offsets[:-1]

        self.incomplete = empty[codes[starts]] | empty[codes[starts + 1]] if len(starts) else np.zeros(1, bool)
        tags = lengths - 2
        # Without keys: gender, place, tags. With keys: 性别 gender 地址 place 兴趣 tags. No tag is one missing item.
        self._plain_offsets = _offsets(2 + np.maximum(tags, 1))
        self._keyed_offsets = _offsets(5 + np.maximum(tags, 1))
        plain, keyed = self._plain_offsets[:-1], self._keyed_offsets[:-1]
        self._plain = np.full(self._plain_offsets[-1], missing)
        self._keyed = np.full(self._keyed_offsets[-1], missing)
        for position, key in zip((0, 2, 4), range(missing - 3, missing), strict=True):
            self._keyed[keyed + position] = key
        for position in (0, 1):
            self._plain[plain + position] = self._keyed[keyed + 1 + 2 * position] = codes[starts + position]
        tag_codes = codes[ranges(starts + 2, tags)]
        self._plain[ranges(plain + 2, tags)] = tag_codes
        self._keyed[ranges(keyed + 5, tags)] = tag_codes

    def columns(self, profiles: Ints, profile_counts: Ints, responder: Ints) -> dict[str, pa.Array]:
        """The persona columns of examples with these profiles (flat, so many an example) and these responders."""
        word_counts = np.diff(self._plain_offsets)[profiles]
        items = self._plain[ranges(self._plain_offsets[profiles], word_counts)]
        letters, letter_ends = self._spell(items)
        letter_counts = np.diff(letter_ends[_offsets(word_counts)])
        example = _offsets(profile_counts)
        target_counts = np.diff(self._keyed_offsets)[responder]
        target = self._keyed[ranges(self._keyed_offsets[responder], target_counts)]
        target_letters, target_ends = self._spell(target)
        return {
            "profile_words": _lists(self._word[items], np.diff(_offsets(word_counts)[example])),
            "profile_word_counts": _lists(word_counts, profile_counts),
            "profile_characters": _lists(letters, np.diff(_offsets(letter_counts)[example])),
            "profile_character_counts": _lists(letter_counts, profile_counts),
            "target_words": _lists(self._word[target], target_counts),
            "target_characters": _lists(target_letters, np.diff(target_ends[_offsets(target_counts)])),
        }

    def _spell(self, items: Ints) -> tuple[NDArray[np.int32], Ints]:
        """The characters of items in a row, and where each item starts (one offset more than items)."""
        counts = self._letter_count[items]
        return self._letters[ranges(self._letter_start[items], counts)], _offsets(counts)


def _column(sessions: pa.Table, name: str) -> pa.Array:
    column = sessions[name].combine_chunks()
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _lengths(lists: pa.Array) -> Ints:
    return pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)


def _offsets(lengths: Ints) -> Ints:
    """Where rows of these lengths start, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


def _lists(values: NDArray[np.integer], lengths: Ints) -> pa.ListArray:
    return pa.ListArray.from_arrays(_offsets(lengths).astype(np.int32), values.astype(np.int32, copy=False))
