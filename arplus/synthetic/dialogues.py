"""Generated records in PersonalDialog's raw form, with the statistics and quirks of the real data.

Text is made of the phrases of :mod:`arplus.synthetic.phrases`. A dialogue has a topic, which decides what phrases are
frequent in it, and replies repeat phrases; so there is more to learn than how frequent a character is. Records are made
many at a time with numpy. In the names, R are records, U utterances, S slots: an utterance's phrases and the words
before them.

No two records have the same dialogue, by construction: the first utterance starts with two words of two characters
that write the record's number (:meth:`Language.code`).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from arplus.data.personas import ABROAD, CITIES, Persona, askable
from arplus.synthetic.personas import ANSWERS, QUESTIONS, TAGS, answer
from arplus.synthetic.phrases import CODE_LENGTH, END_TEXTS, END_WEIGHTS, MAX_LENGTH, Ints, Language
from arplus.text import GENDERS

UTTERANCES = {2: 59, 3: 22, 4: 12, 5: 2, 6: 2, 7: 1.2, 8: 0.75, 9: 0.45, 10: 0.3, 11: 0.15, 12: 0.15}
"""Utterances a session, in percent; mean 2.79."""
LENGTH_MU, LENGTH_SIGMA = 2.24, 0.87
"""Characters an utterance: lognormal, clipped to 1 … 140; at least 4 in the first one, which holds the number."""
SHARES = {"": 0.024, "female": 0.590, "male": 0.386}
"""Genders; a profile without one is empty."""
TWO_PART, ELSEWHERE, OVERSEAS, PROVINCE_ONLY = 0.656, 0.150, 0.080, 0.114
"""Forms of the location, where the profile is not empty: 省 市, 其他, 海外 国, 省."""
TAG_COUNTS = {0: 40.6, 1: 17.4, 2: 8.2, 3: 7.2, 4: 6.5, 5: 5.5, 6: 4.5, 7: 3.5, 8: 2.5, 9: 2, 10: 2.1}
"""Tags a profile that is not empty, in percent; with the empty ones 42 % have none."""
RARE_TAG = 0.2
THREE_SPEAKERS = 0.122
"""Share with three profiles among the sessions of three utterances and more (5 % of all)."""
REPEATED_TURN = 0.03
"""Share of the other such sessions in which someone speaks twice in a row."""
COPIED_PHRASE, RARE_WORD, END_MARK = 0.8, 0.03, 0.5
"""Chances: a phrase is repeated where it can be, a short phrase is any word at all, an utterance ends with a mark."""
DOUBLE_SPACE, WIDE_SPACE = 0.009, 0.002
"""Chance of a double space or a run of NBSP between two phrases: 9 and 2 % of the records."""


def raw_records(
    words: Language, rng: np.random.Generator, numbers_R: Ints, *, seed: int = 0, persona_answers: float = 0.0
) -> list[str]:
    """JSON lines of the records with these numbers; dialogues of one seed differ where their numbers do.

    ``persona_answers`` is the share of exchanges (an utterance at an even place and its reply) that ask for and tell
    the responder's place, gender or hobby, where the profile has one.
    """
    n = len(numbers_R)
    if n == 0:
        return []
    utterances_R = _choice(rng, UTTERANCES, n)
    starts_R = np.cumsum(utterances_R) - utterances_R
    turn_U = np.arange(utterances_R.sum()) - np.repeat(starts_R, utterances_R)
    speaker_U, profiles_R = _speakers(rng, utterances_R, starts_R, turn_U)
    profile_starts_R = np.cumsum(profiles_R) - profiles_R
    personas, profiles = raw_profiles(words, rng, int(profiles_R.sum()))

    custom: dict[int, str] = {}
    if persona_answers:
        asked_U = (turn_U % 2 == 0) & (turn_U + 1 < np.repeat(utterances_R, utterances_R))
        asked_U &= rng.random(len(turn_U)) < persona_answers
        profile_U = np.repeat(profile_starts_R, utterances_R) + speaker_U
        asked = np.flatnonzero(asked_U)
        draws = rng.integers(1 << 30, size=(len(asked), 4)).tolist()
        responders = profile_U[asked + 1].tolist()
        for question, responder_at, (kind, form, reply, tag) in zip(asked.tolist(), responders, draws, strict=True):
            responder = personas[responder_at]
            if kinds := askable(responder):
                wanted = kinds[kind % len(kinds)]
                text = QUESTIONS[wanted][form % len(QUESTIONS[wanted])]
                custom[question] = f"， {text}" if turn_U[question] == 0 else text
                custom[question + 1] = answer(wanted, responder, reply % len(ANSWERS[wanted]), tag)

    dialogs = _dialogs(words, rng, turn_U, words.code(numbers_R, seed), custom)
    lines = []
    speakers = speaker_U.tolist()
    rows = zip(
        dialogs,
        profile_starts_R.tolist(),
        profiles_R.tolist(),
        starts_R.tolist(),
        utterances_R.tolist(),
        strict=True,
    )
    for dialog, profile, profile_count, utterance, utterance_count in rows:
        persons = ", ".join(profiles[profile : profile + profile_count])
        uid = speakers[utterance : utterance + utterance_count]
        lines.append(f'{{"dialog": [["{dialog}"]], "profile": [{persons}], "uid": {uid}}}')
    return lines


def _speakers(rng: np.random.Generator, utterances_R: Ints, starts_R: Ints, turn_U: Ints) -> tuple[Ints, Ints]:
    """The speaker of every utterance, and the number of profiles of every record."""
    long_R = utterances_R >= 3
    three_R = long_R & (rng.random(len(long_R)) < THREE_SPEAKERS)
    repeated_R = long_R & ~three_R & (rng.random(len(long_R)) < REPEATED_TURN)
    # From the repeated turn on, the alternation is shifted by one.
    shift_R = np.where(repeated_R, 1 + (rng.random(len(long_R)) * (utterances_R - 1)).astype(np.int64), 1 << 30)
    speaker_U = (turn_U + (turn_U >= np.repeat(shift_R, utterances_R))) % 2
    for record in np.flatnonzero(three_R).tolist():
        speakers = [0, 1, 2]
        for step in rng.integers(1, 3, size=int(utterances_R[record]) - 3).tolist():
            speakers.append((speakers[-1] + step) % 3)
        speaker_U[starts_R[record] : starts_R[record] + utterances_R[record]] = speakers
    return speaker_U, 2 + three_R.astype(np.int64)


def raw_profiles(words: Language, rng: np.random.Generator, n: int) -> tuple[list[Persona], list[str]]:
    """``n`` random profiles, as personas and as JSON."""
    gender = rng.choice(3, size=n, p=list(SHARES.values()))
    form = rng.choice(4, size=n, p=[TWO_PART, ELSEWHERE, OVERSEAS, PROVINCE_ONLY]).tolist()
    place, sub_place = rng.random(n), rng.random(n)
    counts = np.where(gender == 0, 0, _choice(rng, TAG_COUNTS, n))
    rare = rng.random(counts.sum()) < RARE_TAG
    tag_ids = np.where(
        rare, len(TAGS) + _zipf(rng, len(words.nouns), len(rare)), _zipf(rng, len(TAGS), len(rare))
    ).tolist()
    all_tags = [*TAGS, *words.nouns]
    towns = [f"{province} {city}" for province, cities in CITIES.items() for city in cities.split()]
    towns_by_rank = _mixed(towns)
    places = (
        [towns_by_rank[i] for i in _zipf_of(place, len(towns)).tolist()],
        ["其他"] * n,
        [f"海外 {ABROAD[i]}" for i in _zipf_of(sub_place, len(ABROAD)).tolist()],
        [list(CITIES)[i] for i in _zipf_of(place, len(CITIES)).tolist()],
    )
    personas, profiles, tag = [], [], 0
    raw_genders = list(SHARES)
    for i, (sex, count) in enumerate(zip(gender.tolist(), counts.tolist(), strict=True)):
        raw = raw_genders[sex]
        tags = tuple(dict.fromkeys([all_tags[j] for j in tag_ids[tag : tag + count]]))
        tag += count
        loc = places[form[i]][i] if sex else ""
        personas.append(Persona(GENDERS.get(raw, ""), loc.replace(" ", ""), tags))
        profiles.append(f'{{"tag": ["{";".join(tags)}"], "loc": "{loc}", "gender": "{raw}"}}')
    return personas, profiles


def _dialogs(
    words: Language, rng: np.random.Generator, turn_U: Ints, code_R: tuple[Ints, Ints], custom: Mapping[int, str]
) -> list[str]:
    """The utterances of each record, joined as in JSON; ``custom`` gives the text of some of them.

    ``code_R`` are the two words that open each record.
    """
    opening_U = turn_U == 0
    record_U = np.cumsum(opening_U) - 1
    last_U = np.roll(opening_U, -1)
    length_U = np.rint(np.exp(rng.normal(LENGTH_MU, LENGTH_SIGMA, len(turn_U)))).astype(np.int64)
    length_U = np.clip(length_U, np.where(opening_U, CODE_LENGTH, 1), MAX_LENGTH) - np.where(opening_U, CODE_LENGTH, 0)
    custom_U = np.zeros(len(turn_U), bool)
    custom_U[list(custom)] = True
    marked_U = (length_U > 1) & (rng.random(len(turn_U)) < END_MARK) & ~custom_U
    length_U -= marked_U

    # Slots: the two words of the record's number, then phrases whose lengths sum up to the utterance's.
    split_U = words.split(rng, length_U)
    phrases_U = np.where(custom_U, 1, words.split_count[split_U])
    slots_U = phrases_U + 2 * opening_U
    start_U = np.cumsum(slots_U) - slots_U
    utterance_S = np.repeat(np.arange(len(turn_U)), slots_U)
    place_S = np.arange(len(utterance_S)) - start_U[utterance_S] - 2 * opening_U[utterance_S]
    phrase_S = (place_S >= 0) & ~custom_U[utterance_S]
    size_S = np.ones_like(place_S)
    size_S[phrase_S] = words.split_sizes[words.split_start[split_U[utterance_S[phrase_S]]] + place_S[phrase_S]]

    topic_R = rng.integers(words.topics, size=len(code_R[0]))
    text_S = words.phrases(rng, size_S, topic_R[record_U[utterance_S]])
    rare_S = phrase_S & (size_S <= 2) & (rng.random(len(size_S)) < RARE_WORD)
    text_S[rare_S] = words.rare(rng, size_S[rare_S])
    _repeat_phrases(rng, turn_U, start_U + 2 * opening_U, (phrases_U > 0) & ~custom_U, size_S, text_S)
    opening_S = start_U[opening_U]
    text_S[opening_S], text_S[opening_S + 1] = code_R

    texts = words.texts[text_S]
    if custom:
        texts[(start_U + 2 * opening_U)[list(custom)]] = list(custom.values())
    spaces = rng.random(len(texts))
    between = np.array([" ", "  ", " \u00a0\u00a0\u00a0 "], object)
    after = between[(spaces < DOUBLE_SPACE + WIDE_SPACE) * 1 + (spaces < WIDE_SPACE) * 1]
    marks = np.array(["", *END_TEXTS], object)
    ends = np.array(['"], ["', "\n"], object)
    mark_U = np.where(marked_U, 1 + rng.choice(len(END_TEXTS), size=len(turn_U), p=END_WEIGHTS), 0)
    after[start_U + slots_U - 1] = marks[mark_U] + ends[last_U * 1]
    pieces = np.empty(2 * len(texts), object)
    pieces[0::2], pieces[1::2] = texts, after
    return "".join(pieces.tolist()).split("\n")[:-1]


def _repeat_phrases(
    rng: np.random.Generator, turn_U: Ints, first_U: Ints, has_U: NDArray[np.bool_], size_S: Ints, text_S: Ints
) -> None:
    """Lets an utterance often begin with the phrase that the one before began with, where both have one length."""
    at = np.flatnonzero((turn_U > 0) & has_U & np.roll(has_U, 1))
    at = at[rng.random(len(at)) < COPIED_PHRASE]
    at = at[size_S[first_U[at]] == size_S[first_U[at - 1]]]
    text_S[first_U[at]] = text_S[first_U[at - 1]]


def _choice(rng: np.random.Generator, weights: Mapping[int, float], n: int) -> Ints:
    p = np.array(list(weights.values()))
    return rng.choice(np.array(list(weights)), size=n, p=p / p.sum())


def _zipf(rng: np.random.Generator, size: int, n: int) -> Ints:
    return _zipf_of(rng.random(n), size)


def _zipf_of(uniform: NDArray[np.float64], size: int) -> Ints:
    """Uniform numbers to ranks 0 … size - 1 with probability about 1 / (rank + 1)."""
    return np.minimum(np.power(size + 1.0, uniform).astype(np.int64) - 1, size - 1)


def _mixed(items: list[str]) -> list[str]:
    """The same items in a fixed order that has nothing to do with theirs."""
    return [items[i] for i in np.random.default_rng(0).permutation(len(items))]
