"""The generator's made-up language: phrases of jieba's words by a modest grammar.

It is the same for every seed, so that data sets of different seeds speak one language.
"""

import importlib.util
from bisect import bisect
from collections import defaultdict
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from arplus.errors import UsageError

Ints = NDArray[np.int64]

CODE_LENGTH = 4
"""Characters that open a dialogue and write its number: two words of two."""

END_TEXTS = (" ！", " ？", "?", " ～", " ~", " 〜", " 。", " …", " \ufe0f", "！")
END_WEIGHTS = (0.3, 0.2, 0.08, 0.1, 0.05, 0.03, 0.13, 0.06, 0.02, 0.03)
"""What ends an utterance, with all the variants of the real data; U+FE0F is what is left of an emoji."""

_PARTICLES = "呢吧吗啊呀啦嘛哦"
_CHAT = {
    1: "嗯|哦|好|哈|对|来|啊|是",
    2: "哈哈|好的|是 啊|嗯嗯|真 的|晚安|早安|谢谢|没有|可以|不是|加油|好 吧|嘻嘻|呵呵|来 吧",
    3: "哈哈哈|为什么|没关系|不客气|怎么 了|好 想 吃|不 知道|对 啊 对|太 好 了|想 你 了",
    4: "生日 快乐|我 也 觉得|没有 办法|早点 休息|吃饭 没有|哈哈 哈哈|注意 身体|好久 不见|我 也 想去",
    5: "这 是 什么 啊|也 祝 你 快乐|刚刚 才 到 家|你 在 干 什么|我 也 不 知道",
    6: "今天 天气 真 好|我 也 想 去 看看|你 怎么 还 不 睡",
}
"""Set phrases by length, the most frequent of their pools."""

_GRAMMAR = {
    1: ["v1", "a1", "y1"],
    2: ["n2", "v2", "a2", "t2", "d1 v1", "r1 v1", "v1 y1"],
    3: ["r1 v2", "v1 n2", "d1 v2", "d1 a2", "n2 y1", "a2 y1", "r1 d1 v1"],
    4: ["r2 v2", "v2 n2", "d2 v2", "a2 n2", "t2 v2", "r1 d1 v2", "r1 v1 n2", "d1 a2 y1"],
    5: ["r1 v2 n2", "r1 d2 v2", "t2 r1 v2", "v1 a2 n2", "r2 v1 n2", "n2 d1 a2"],
    6: ["r2 v2 n2", "t2 v2 n2", "r1 d1 v2 n2", "n2 d2 v2", "a2 n2 d1 v1", "r1 v2 n2 y1"],
}
"""Phrases by their number of characters: parts of speech of jieba, each with its word's length."""
_POOL_SIZES = {1: 150, 2: 2500, 3: 3500, 4: 5000, 5: 3000, 6: 3000}
_SIZE_WEIGHTS = {1: 0.06, 2: 0.3, 3: 0.22, 4: 0.25, 5: 0.1, 6: 0.07}
_BUCKET = {1: 250, 2: 2000}
_TOPICS, _ON_TOPIC = 64, 0.7
_STEEPNESS = 1.25
"""1 makes the phrases Zipf-distributed; more favours the frequent ones."""
_SPLITS = 12
MAX_LENGTH = 140
"""Characters of the longest utterance."""
_CODE_WORDS = 20_000
_STEP = 12_345_701
"""A prime, so prime to the number of codes: spreads consecutive numbers over all pairs of words."""


@dataclass(frozen=True, eq=False)
class Language:
    """Phrases by number of characters, ways to split a length into phrases, and words that write numbers."""

    texts: NDArray[np.object_]
    """All phrases, words spaced; the phrases of one size lie together."""
    pool_start: Ints
    """First phrase of each size."""
    pool_size: Ints
    """Number of phrases of each size."""
    code_start: int
    """First of the words of two characters that write numbers."""
    code_words: int
    """Their number."""
    single_start: int
    """First of the single characters."""
    singles: int
    """Their number: all that the dictionary has."""
    nouns: list[str]
    """Words that serve as rare tags."""
    topics: int
    """Number of topics: orders in which the phrases of a size are frequent."""
    split_start: Ints
    """First entry in ``split_sizes`` of each way to split a length; see :meth:`split`."""
    split_count: Ints
    """Number of phrases of each way."""
    split_sizes: Ints
    """Sizes of the phrases of each way, flat."""

    def split(self, rng: np.random.Generator, length: Ints) -> Ints:
        """A random way to split each length of 0 … 140 characters into phrases."""
        return length * _SPLITS + rng.integers(_SPLITS, size=len(length))

    def phrases(self, rng: np.random.Generator, size: Ints, topic: Ints) -> Ints:
        """A random phrase of each size: Zipf-distributed, mostly over the order of the topic."""
        n_S = self.pool_size[size]
        uniform_S = rng.random(len(size)) ** _STEEPNESS
        rank_S = np.minimum(np.exp(uniform_S * np.log(n_S + 1.0)).astype(np.int64) - 1, n_S - 1)
        shift_S = np.where(rng.random(len(size)) < _ON_TOPIC, topic * n_S // self.topics, 0)
        return self.pool_start[size] + (rank_S + shift_S) % n_S

    def rare(self, rng: np.random.Generator, size: Ints) -> Ints:
        """A random word of each size, 1 or 2, whatever its frequency: the long tail of characters."""
        draw_S = rng.random(len(size))
        one_S = self.single_start + (draw_S * self.singles).astype(np.int64)
        return np.where(size == 1, one_S, self.code_start + (draw_S * self.code_words).astype(np.int64))

    def code(self, numbers: Ints, seed: int) -> tuple[Ints, Ints]:
        """The two words of each number: for one seed different pairs for different numbers below ``code_words``²."""
        mixed = (numbers * _STEP + seed % self.code_words**2) % self.code_words**2
        return self.code_start + mixed // self.code_words, self.code_start + mixed % self.code_words


@cache
def language() -> Language:
    """Builds the language from jieba's dictionary; always the same for one dictionary.

    Raises :class:`UsageError` where jieba is not installed.
    """
    by_kind = _words()
    rng = np.random.default_rng(0)
    texts: list[str] = []
    start, count = np.zeros(7, np.int64), np.ones(7, np.int64)
    for size, patterns in _GRAMMAR.items():
        phrases = dict.fromkeys(_CHAT[size].split("|"))
        for _ in range(20 * _POOL_SIZES[size]):
            if len(phrases) >= _POOL_SIZES[size]:
                break
            pattern = patterns[int(rng.integers(len(patterns)))]
            phrases[" ".join(_draw(rng, by_kind[kind], _BUCKET[int(kind[1])]) for kind in pattern.split())] = None
        start[size], count[size] = len(texts), len(phrases)
        texts += phrases
    twos = [word for kind, words in by_kind.items() if kind[1] == "2" for word, _ in words]
    frequency = {word: f for kind, words in by_kind.items() if kind[1] == "2" for word, f in words}
    codes = sorted(dict.fromkeys(twos), key=lambda word: (-frequency[word], word))[:_CODE_WORDS]
    singles = sorted({character for words in by_kind.values() for word, _ in words for character in word})
    nouns = [word for word, _ in [*by_kind["n2"][:3000], *by_kind["n3"][:3000]]]
    nouns = [nouns[i] for i in rng.permutation(len(nouns))]
    ways = [_split(rng, length) for length in range(MAX_LENGTH + 1) for _ in range(_SPLITS)]
    ways_count = np.array([len(way) for way in ways])
    return Language(
        texts=np.array([*texts, *codes, *singles], object),
        pool_start=start,
        pool_size=count,
        code_start=len(texts),
        code_words=len(codes),
        single_start=len(texts) + len(codes),
        singles=len(singles),
        nouns=nouns,
        topics=_TOPICS,
        split_start=np.cumsum(ways_count) - ways_count,
        split_count=ways_count,
        split_sizes=np.array([size for way in ways for size in way]),
    )


def _words() -> dict[str, list[tuple[str, int]]]:
    """The words of jieba with their counts by part of speech and length ("n2"), the most frequent first."""
    spec = importlib.util.find_spec("jieba")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError("jieba, whose word list the generator uses, is not installed: pip install -e '.[demo]'")
    words: dict[str, list[tuple[str, int]]] = defaultdict(list)
    for line in (Path(spec.submodule_search_locations[0]) / "dict.txt").read_text(encoding="utf-8").splitlines():
        word, count, kind = line.split(" ")
        if len(word) <= 3 and all("\u4e00" <= character <= "\u9fff" for character in word):
            words[f"{kind}{len(word)}"].append((word, int(count)))
    for found in words.values():
        found.sort(key=lambda item: (-item[1], item[0]))
    words["y1"] = [(particle, 1) for particle in _PARTICLES]
    return words


def _draw(rng: np.random.Generator, words: list[tuple[str, int]], most: int) -> str:
    """One of the ``most`` most frequent words, with probability about 1 / sqrt(rank)."""
    return words[int(rng.random() ** 2 * min(most, len(words)))][0]


def _split(rng: np.random.Generator, length: int) -> list[int]:
    """Random phrase sizes that sum up to ``length``."""
    bounds = list(accumulate(_SIZE_WEIGHTS.values()))
    sizes: list[int] = []
    while length:
        longest = min(length, len(bounds))
        sizes.append(1 + bisect(bounds, rng.random() * bounds[longest - 1], hi=longest - 1))
        length -= sizes[-1]
    return sizes
