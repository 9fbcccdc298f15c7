"""Raw line → session, or the reason why not.

Every form of the data set is read: the raw one (utterances and tags in one-element lists), the flatter Hugging Face
one (also with the profiles as columns), tags as one string, and test records with ``responder_profile`` (or
``response_profile``) and ``golden_response``, which becomes the last utterance, spoken by that profile.

:func:`parse_line` runs once per record and is the bottleneck of the whole preparation (some 8 µs each), hence the
exact type checks, the few objects, and text that stays one string until a whole block of it is cut at once.
"""

import codecs
import json
import math
from functools import lru_cache
from hashlib import blake2b
from typing import Any, NamedTuple

import orjson

from arplus.data.hashes import HASH_BYTES
from arplus.text import GENDERS, VARIATION_SELECTOR, clean

MAX_LINE_BYTES = 64 << 20
"""A longer line is rejected: what a line may cost in memory is bounded."""
MAX_TAGS = 100
"""Tags kept of a profile, the first ones: a batch is as wide as its widest profile. Real ones have at most ten."""
MAX_WORD_CHARACTERS = 50
"""Characters kept of a tag and of a place, for the same reason. Real tags have at most seven, places some twelve."""

REJECT_REASONS = {
    "line_too_long": f"the line is longer than {MAX_LINE_BYTES >> 20} MiB",
    "invalid_utf8": "the line is not UTF-8",
    "invalid_json": "the line is not JSON (cut, with a raw control character, or nested too deep)",
    "json_constant": "the line holds NaN or Infinity, which JSON has not; write null instead",
    "number_too_large": "the line holds a number beyond the range of a 64-bit float",
    "lone_surrogate": "the line holds one half of a surrogate pair (\\ud800 to \\udfff) without the other",
    "not_an_object": "the line is JSON, but not an object",
    "dialog": "`dialog` is missing or not a list",
    "empty_dialogue": "`dialog` has no utterance",
    "utterance": "an utterance is neither a string nor a list of one string",
    "profile": "`profile` is missing or not a list of objects",
    "gender": "a gender is not male, female or the empty string",
    "loc": "a location is not a string",
    "tag": "tags are neither a string nor a list of strings",
    "uid": "`uid` is not a list of whole numbers",
    "uid_length": "`uid` needs one entry per utterance",
    "uid_out_of_range": "`uid` (or, without it, alternation) names a profile that is not there",
    "golden_response": "`golden_response` or its profile is missing, or of a wrong type",
}
"""Every reason for which a line can be rejected, in words."""

_GENDERS = {**GENDERS, "": ""}


class Profile(NamedTuple):
    """A speaker's persona as words."""

    text: str
    """Gender (男, 女 or empty), place (province and city joined, or empty), then the tags, each once; tabs between."""
    key: str
    """The same with the tags in order: equal for what counts as the same profile."""
    tags_left_out: int = 0
    """Different tags beyond :data:`MAX_TAGS`."""
    words_cut: int = 0
    """Tags and places longer than :data:`MAX_WORD_CHARACTERS`."""

    @property
    def words(self) -> tuple[str, ...]:
        """Gender, place, tags."""
        return tuple(self.text.split("\t"))


class Session(NamedTuple):
    """One dialogue with its speakers, normalised."""

    dialogue: str
    """The utterances without white space, with line feeds between; U+FE0F is still in it."""
    speakers: list[int]
    """For each utterance, which profile speaks."""
    profiles: list[Profile]
    """Any number of them, at least one."""
    uid_missing: bool
    """True where the record does not say who speaks and alternation was assumed."""
    has_reference: bool
    """True where the last utterance is a test record's reference reply."""
    dialogue_hash: bytes
    """Of the utterances without white space."""
    record_hash: bytes
    """Of the utterances without white space, who speaks them, and the profiles."""

    @property
    def utterances(self) -> list[str]:
        """The utterances without white space and U+FE0F; they may be empty."""
        return self.dialogue.replace(VARIATION_SELECTOR, "").split("\n")


class Reject(NamedTuple):
    """A line that is not a session."""

    reason: str
    """One of :data:`REJECT_REASONS`."""


def parse_line(line: bytes) -> Session | Reject:
    """Reads one line without its line ending. Never raises: what is not a session is a :class:`Reject`."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        if line.startswith(codecs.BOM_UTF8):  # files that begin with one, put together
            return parse_line(line.removeprefix(codecs.BOM_UTF8))
        return Reject(_why_not_json(line))
    if type(record) is not dict:
        return Reject("not_an_object")
    dialog = record.get("dialog")
    if type(dialog) is not list:
        return Reject("dialog")
    if not dialog:
        return Reject("empty_dialogue")
    raw_profiles = record.get("profile")
    if type(raw_profiles) is dict:
        raw_profiles = _rows(raw_profiles)
    if type(raw_profiles) is not list:
        return Reject("profile")

    items = []
    for item in dialog:
        if type(item) is list and len(item) == 1:
            item = item[0]
        if type(item) is not str:
            return Reject("utterance")
        items.append(item)
    profiles = [_parse_profile(raw) for raw in raw_profiles]
    for profile in profiles:
        if type(profile) is Reject:
            return profile

    speakers = record.get("uid")
    uid_missing = speakers is None
    if uid_missing:
        speakers = [i & 1 for i in range(len(items))]
    elif type(speakers) is not list:
        return Reject("uid")
    if len(speakers) != len(items):
        return Reject("uid_length")
    last = len(profiles) - 1
    for speaker in speakers:
        if type(speaker) is not int:
            return Reject("uid")
        if not 0 <= speaker <= last:
            return Reject("uid_out_of_range")

    has_reference = record.get("golden_response") is not None
    if has_reference:
        reject = _append_golden_response(record, items, speakers, profiles)
        if reject:
            return reject

    dialogue = _joined(items)
    dialogue_hash = blake2b(dialogue.encode(), digest_size=HASH_BYTES).digest()
    # No part holds white space, so the joined string cannot be read in two ways.
    who = "\n".join([str(speakers), *[profile.key for profile in profiles]])
    record_hash = blake2b(dialogue_hash + who.encode(), digest_size=HASH_BYTES).digest()
    return Session(dialogue, speakers, profiles, uid_missing, has_reference, dialogue_hash, record_hash)


def _joined(texts: list[str]) -> str:
    """The texts without white space, with line feeds between."""
    # All at once: NUL is not white space, so it can stand between the texts while that is taken out.
    # Spaces first: the general way is slow where it finds many.
    joined = "".join("\0".join(texts).replace(" ", "").split())
    if joined.count("\0") != len(texts) - 1:  # a text holds one itself
        return "\n".join(["".join(text.split()) for text in texts])
    return joined.replace("\0", "\n")


def make_profile(gender: str, location: str, tags: str) -> Profile:
    """A profile from its raw strings: ``male``, ``female`` or empty; "省 市"; tags joined by ``;``.

    White space and U+FE0F disappear: "四川 成都" is the one word 四川成都. What is more than :data:`MAX_TAGS` and
    :data:`MAX_WORD_CHARACTERS` allow is cut off and counted. Raises KeyError for another gender, and TypeError or
    AttributeError for what is not a string.
    """
    plain = _without_tags(gender, location)
    if tags == "":
        return plain
    tags = clean(tags)
    words = list(dict.fromkeys(tags.split(";")))
    if "" in words:
        words.remove("")
    left_out = cut = 0
    if len(tags) > MAX_WORD_CHARACTERS:  # else there is neither a longer tag nor so many
        left_out = max(0, len(words) - MAX_TAGS)
        words = words[:MAX_TAGS]
        cut = sum(len(word) > MAX_WORD_CHARACTERS for word in words)
        words = list(dict.fromkeys([word[:MAX_WORD_CHARACTERS] for word in words]))
    text = "\t".join([plain.text, *words])
    words.sort()
    return Profile(text, "\t".join([plain.text, *words]), left_out, plain.words_cut + cut)


@lru_cache(maxsize=1 << 14)
def _without_tags(gender: str, location: str) -> Profile:
    place = clean(location)
    text = f"{_GENDERS[gender]}\t{place[:MAX_WORD_CHARACTERS]}"
    return Profile(text, text, 0, int(len(place) > MAX_WORD_CHARACTERS))


def _parse_profile(raw: Any) -> Any:
    """A :class:`Profile` or a :class:`Reject` (``Any``: the caller tells by type, at no cost)."""
    try:
        tags = raw["tag"]
        return make_profile(raw["gender"], raw["loc"], tags[0] if type(tags) is list and len(tags) == 1 else tags)
    except (TypeError, KeyError, AttributeError):  # not the usual form
        return _parse_unusual_profile(raw)


def _parse_unusual_profile(raw: Any) -> Profile | Reject:
    """The same for missing and null items and several tags in a list, and with the reason for what is wrong."""
    if type(raw) is not dict:
        return Reject("profile")
    gender, location, tags = raw.get("gender"), raw.get("loc"), raw.get("tag")
    gender, location = "" if gender is None else gender, "" if location is None else location
    if type(gender) is not str or gender not in _GENDERS:
        return Reject("gender")
    if type(location) is not str:
        return Reject("loc")
    if type(tags) is not list:
        tags = [] if tags is None else [tags]
    if not all(type(tag) is str for tag in tags):
        return Reject("tag")
    return make_profile(gender, location, ";".join(tags))


def _append_golden_response(
    record: dict[str, Any], texts: list[str], speakers: list[int], profiles: list[Profile]
) -> Reject | None:
    """Adds a test record's reference reply as the last utterance, spoken by a profile of its own."""
    text = record["golden_response"]
    if type(text) is list and len(text) == 1:
        text = text[0]
    if type(text) is not str:
        return Reject("golden_response")
    raw = record.get("responder_profile")
    profile = _parse_profile(record.get("response_profile") if raw is None else raw)
    if type(profile) is Reject:
        return Reject("golden_response")
    texts.append(text)
    speakers.append(len(profiles))
    profiles.append(profile)
    return None


def _rows(columns: dict[str, Any]) -> Any:
    """Profiles from the columns in which `datasets` hands out a sequence of objects; None where they do not fit."""
    parts = [columns.get(name) for name in ("gender", "loc", "tag")]
    if not all(type(part) is list for part in parts) or len({len(part) for part in parts if part is not None}) != 1:
        return None
    return [{"gender": g, "loc": place, "tag": t} for g, place, t in zip(*parts, strict=True)]


def _why_not_json(line: bytes) -> str:
    """Why orjson refuses a line. What Python's own reader would take is not JSON either, and is called by its name."""
    constants: list[str] = []
    infinite: list[float] = []

    def number(text: str) -> float:
        value = float(text)
        if math.isinf(value):
            infinite.append(value)
        return value

    try:
        record = json.loads(line.decode(), parse_constant=constants.append, parse_int=number, parse_float=number)
        json.dumps(record, ensure_ascii=False).encode()
    except UnicodeDecodeError:
        return "invalid_utf8"
    except UnicodeEncodeError:
        return "lone_surrogate"
    except (ValueError, RecursionError):
        return "invalid_json"
    return "json_constant" if constants else "number_too_large" if infinite else "invalid_json"
