"""Characters, persona words and their ids: what counts as text, and the two vocabularies.

A vocabulary's ordinary tokens take the ids 0, 1, … in order of falling frequency; the nine special tokens follow as
the last nine ids (:data:`arplus.config.SPECIAL_TOKENS`), as in the vocabularies of the paper's public code.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from arplus import storage
from arplus.config import SPECIAL_TOKENS, SpecialIds, VocabularySizes, special_ids
from arplus.errors import UsageError

PERSONA_KEYS = ("性别", "地址", "兴趣")
"""The keys before gender, place and tags in a target persona."""
MALE, FEMALE = "男", "女"
GENDERS = {"male": MALE, "female": FEMALE}
"""The genders as records and as persona words have them."""
ALWAYS_PERSONA_WORDS = (*PERSONA_KEYS, *GENDERS.values())
"""Persona words that are in every counted vocabulary."""
ALWAYS_CHARACTERS = tuple(dict.fromkeys("".join(ALWAYS_PERSONA_WORDS)))
"""Their characters, which are in every counted character vocabulary."""

VARIATION_SELECTOR = "\ufe0f"
"""U+FE0F, which stays behind where an emoji was stripped; it shows nothing."""


def clean(text: str) -> str:
    """``text`` as the model sees it: no white space and no U+FE0F. Nothing else changes (no NFKC).

    White space is what :meth:`str.isspace` calls so: NBSP and U+3000 are, U+200B is not.
    """
    text = text.replace(" ", "")
    if text.isprintable() and VARIATION_SELECTOR not in text:  # so there is no other white space
        return text
    return "".join(text.split()).replace(VARIATION_SELECTOR, "")


class Vocabulary:
    """Tokens and their ids; the special tokens are the last nine ids.

    ``counts`` are how often each token was seen (0 where nobody counted). Raises :class:`UsageError` for a token that
    is there twice or is empty.
    """

    def __init__(self, tokens: Sequence[str], counts: Sequence[int] | None = None, *, source: str = "vocabulary"):
        self.tokens = list(tokens)
        self.counts = [0] * len(self.tokens) if counts is None else [int(n) for n in counts]
        assert len(self.counts) == len(self.tokens)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        for token, seen in Counter(self.tokens).items():
            if not token or seen > 1:
                raise UsageError(f"{source}: token {token!r} is {'there twice' if token else 'empty'}")

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return len(self.tokens) + len(SPECIAL_TOKENS)

    @property
    def special(self) -> SpecialIds:
        """Ids of the special tokens."""
        return special_ids(self.size)

    def __contains__(self, token: object) -> bool:
        return token in self._ids

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and (self.tokens, self.counts) == (other.tokens, other.counts)

    __hash__ = None  # type: ignore[assignment]

    def encode(self, tokens: Iterable[str]) -> NDArray[np.int32]:
        """Ids of whole tokens, [UNK] for strangers. A string is a sequence of characters."""
        unk, ids = self.special.unk, self._ids
        return np.fromiter((ids.get(token, unk) for token in tokens), dtype=np.int32)

    @cached_property
    def by_code_point(self) -> NDArray[np.int32]:
        """The id of every Unicode code point (shape 0x110000), [UNK] for strangers: one look-up encodes any text."""
        table = np.full(0x110000, self.special.unk, dtype=np.int32)
        for token, i in self._ids.items():
            if len(token) == 1:
                table[ord(token)] = i
        return table

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids`` up to the first special token."""
        text = []
        for i in ids:
            if i >= len(self.tokens):
                break
            text.append(self.tokens[i])
        return "".join(text)

    def token(self, i: int) -> str:
        """The token with id ``i``, special tokens by their names."""
        return self.tokens[i] if i < len(self.tokens) else SPECIAL_TOKENS[i - len(self.tokens)]

    @classmethod
    def from_counts(
        cls, counts: Mapping[str, int], *, minimum: int, maximum: int, always: Sequence[str] = ()
    ) -> "Vocabulary":
        """The ``maximum`` most frequent tokens that were seen at least ``minimum`` times.

        Tokens of ``always`` are in it whatever their count. Equal counts are ordered by code points, so the result
        depends on the counts alone. Words spelled like a special token are in none: they are strangers.
        """
        kept = dict.fromkeys(always)
        seen = (t for t, n in counts.items() if n >= minimum and t not in kept and t not in SPECIAL_TOKENS)
        others = sorted(seen, key=lambda t: (-counts[t], t))
        chosen = [*kept, *others[: max(0, maximum - len(kept))]]
        chosen.sort(key=lambda t: (-counts.get(t, 0), t))
        return cls(chosen, [counts.get(t, 0) for t in chosen])

    @classmethod
    def load(cls, uri: str) -> "Vocabulary":
        """Reads a vocabulary file; see :meth:`from_bytes`."""
        return cls.from_bytes(storage.read_bytes(uri), source=uri)

    @classmethod
    def from_bytes(cls, data: bytes, *, source: str) -> "Vocabulary":
        """Reads ``token<TAB>count``, ``token count`` or ``token`` lines, in order of ids, without the special tokens.

        The last white space of a line separates the count, so a token may contain spaces. Raises :class:`UsageError`
        naming ``source``.
        """
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise UsageError(f"{source}: not UTF-8 text ({error})") from None
        if not text.startswith("\ufeff\t"):  # there it is a token of ours; elsewhere an editor's byte order mark
            text = text.removeprefix("\ufeff")
        lines = text.split("\n")
        pairs = [_token_and_count(line.rstrip("\r")) for line in lines if line.rstrip("\r")]
        if not pairs:
            raise UsageError(f"{source}: an empty vocabulary; expected one token (and its count) per line")
        special = next((token for token, _ in pairs if token in SPECIAL_TOKENS), None)
        if special:
            raise UsageError(f"{source}: contains {special}; leave the nine special tokens out, they come last")
        return cls([token for token, _ in pairs], [count for _, count in pairs], source=source)

    def to_bytes(self) -> bytes:
        """``token<TAB>count`` lines, which :meth:`from_bytes` reads back."""
        return "".join(f"{t}\t{n}\n" for t, n in zip(self.tokens, self.counts, strict=True)).encode()


def sizes(characters: Vocabulary, persona_words: Vocabulary) -> VocabularySizes:
    """The sizes that a model for these two vocabularies has."""
    return VocabularySizes(characters=characters.size, persona_words=persona_words.size)


def _token_and_count(line: str) -> tuple[str, int]:
    for separator in ("\t", " "):
        token, found, count = line.rpartition(separator)
        if found and token and count.removeprefix("-").isascii() and count.removeprefix("-").isdigit():
            return token, int(count)
    return line, 0
