"""What workers counted apart adds up to what one would have counted."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest

from arplus.sums import SAME, Sums


@dataclass
class Part(Sums):
    n: int = 0
    by_value: np.ndarray = field(default_factory=lambda: np.zeros(3, int))
    words: Counter[str] = field(default_factory=Counter)
    seen: set[int] = field(default_factory=set)
    histograms: dict[str, np.ndarray] = field(default_factory=lambda: {"length": np.zeros(2, int)})
    samples: list[str] = field(default_factory=list)


@dataclass
class Whole(Sums):
    width: int = field(metadata=SAME)
    part: Part = field(default_factory=Part)


def test_every_kind_of_sum_adds_up_and_both_parts_stay_as_they_are() -> None:
    mine = Whole(7, Part(1, np.array([1, 0, 2]), Counter("ab"), {1, 2}, {"length": np.array([3, 4])}, ["a"]))
    other = Whole(7, Part(2, np.array([0, 5, 1]), Counter("bc"), {2, 3}, {"length": np.array([1, 1])}, ["b", "c"]))
    both = (mine + other).part
    assert (both.n, both.by_value.tolist(), both.words) == (3, [1, 5, 3], Counter("abbc"))
    assert (both.seen, both.histograms["length"].tolist(), both.samples) == ({1, 2, 3}, [4, 5], ["a", "b", "c"])
    assert (mine.part.n, mine.part.seen, other.part.samples) == (1, {1, 2}, ["b", "c"])
    assert (mine + other).width == 7


def test_what_is_not_the_same_in_both_does_not_add_up() -> None:
    with pytest.raises(AssertionError, match="width"):
        Whole(7) + Whole(8)


def test_in_place_it_comes_to_the_same_and_the_other_part_stays_as_it_is() -> None:
    def parts() -> list[Part]:
        return [
            Part(1, np.array([1, 0, 2]), Counter("ab"), {1, 2}, {"length": np.array([3, 4])}, ["a"]),
            Part(2, np.array([0, 5, 1]), Counter("bc"), {2, 3}, {"length": np.array([1, 1])}, ["b", "c"]),
        ]

    one, other = parts()
    words = one.words
    whole, one.by_value.flags.writeable = one + other, False  # as Ray gives arrays back
    one += other
    assert one.words is words, "not a copy for each part"
    assert repr(one) == repr(whole)
    assert repr(other) == repr(parts()[1])
    with pytest.raises(AssertionError, match="width"):
        Whole(7).__iadd__(Whole(8))
