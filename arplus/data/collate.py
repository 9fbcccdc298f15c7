"""Rows of encoded examples to padded arrays, without a Python loop over rows or characters.

A :class:`Window` holds some thousand examples as flat arrays and offsets, the way Arrow stores them. All its batches
are made at once, a scatter a field: 256 batches of 64 take 28 ms, where one batch after the other took 95.
Dimensions are those of :mod:`arplus.model.batch`; N is the number of batches.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from arplus.config import ExampleRules, ModelConfig, SpecialIds, VocabularySizes, special_ids

Int = NDArray[np.int32]

CONTEXT_UNIT = 1024
"""What a character of context counts in a window's sort key, beside one for a character of the response."""


class Ragged(NamedTuple):
    """Lists of different lengths: list ``i`` is ``values[starts[i]:starts[i] + lengths[i]]``."""

    values: Int
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]

    @classmethod
    def of_rows(cls, rows_RL: Int, lengths_R: NDArray[np.int64]) -> "Ragged":
        """The first ``lengths_R`` values of every row of an array."""
        R, width = rows_RL.shape
        return cls(rows_RL.ravel(), np.arange(R) * width, lengths_R)

    def padded(self, rows_R: NDArray[np.int64], widths_R: NDArray[np.int64], pad: int) -> Int:
        """Lists ``rows_R``, each filled up with ``pad`` to its width in ``widths_R``, one after the other and flat."""
        lengths_R = self.lengths[rows_R]
        first_R = np.cumsum(lengths_R) - lengths_R
        real = np.arange(lengths_R.sum())
        target = real + np.repeat(np.cumsum(widths_R) - widths_R - first_R, lengths_R)
        padded = np.full(widths_R.sum(), pad, np.int32)
        padded[target] = self.values[real + np.repeat(self.starts[rows_R] - first_R, lengths_R)]
        return padded


class Arrays(NamedTuple):
    """One field of every batch of a window: arrays of different shapes, one after the other and flat."""

    values: NDArray[Any]
    shapes: list[tuple[int, ...]]
    """A shape a batch."""


class Widths(NamedTuple):
    """Widths are rounded up to multiples of these: all 1 for no more padding than a batch needs."""

    context: int = 1
    response: int = 1
    profiles: int = 1
    persona: int = 1

    @classmethod
    def static(cls, rules: ExampleRules) -> "Widths":
        """For kernels that are compiled per shape: few widths of contexts, and one of all else but for rare profiles.

        Contexts have a width for each number of utterances (seven by default). The longest infilled response is the
        longest response with an inserted [MASK].
        """
        utterance = rules.max_utterance_characters + 1
        return cls(context=utterance, response=rules.max_response_ids + 1, profiles=4, persona=16)


EXACT = Widths()
"""As narrow as a batch allows."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a model reads of an example."""

    sizes: VocabularySizes
    """Sizes of the vocabularies that the ids belong to."""
    persona_words: bool
    """Personas as words of the persona vocabulary (MemN2N), else as characters."""
    infilling: bool
    """Whether the auxiliary task is infilling, so that batches carry infilled responses."""

    @classmethod
    def of(cls, model: ModelConfig, sizes: VocabularySizes) -> "Layout":
        """What a model of this configuration reads."""
        return cls(sizes=sizes, persona_words=model.memory_hops > 0, infilling=model.auxiliary == "infilling")

    @property
    def persona_columns(self) -> tuple[str, str, str]:
        """The columns of the profiles, of their item counts and of the target persona."""
        if self.persona_words:
            return "profile_words", "profile_word_counts", "target_words"
        return "profile_characters", "profile_character_counts", "target_characters"

    @property
    def columns(self) -> list[str]:
        """The columns of a data set file that a batch is made from."""
        return ["example_id", "context", "speakers", "response", *self.persona_columns]


class Window:
    """Examples in memory, ready to be cut into batches."""

    def __init__(self, table: pa.Table, layout: Layout) -> None:
        self.layout = layout
        self.characters: SpecialIds = special_ids(layout.sizes.characters)
        persona_size = layout.sizes.persona_words if layout.persona_words else layout.sizes.characters
        self.persona_pad = special_ids(persona_size).pad
        profiles, counts, target = layout.persona_columns
        self.example_id: NDArray[np.int64] = table["example_id"].to_numpy()
        self.context = _ragged(table["context"])
        self.response = _ragged(table["response"])
        self.target = _ragged(table[target])
        # Every utterance ends with [SEP], so the number of [SEP] before a character is the index of its utterance.
        ends = self.context.values == self.characters.sep
        speakers = _ragged(table["speakers"]).values
        assert len(speakers) == int(ends.sum()), "every context utterance has a speaker and a [SEP]"
        self.context_profile = self.context._replace(values=speakers[np.cumsum(ends) - ends])
        item_counts = _ragged(table[counts])
        # The number of every profile, by example; the last one is empty and fills an example up.
        self.profiles_of_example = item_counts._replace(values=np.arange(len(item_counts.values), dtype=np.int32))
        lengths = np.append(item_counts.values, 0).astype(np.int64)
        self.profile = Ragged(_ragged(table[profiles]).values, np.cumsum(lengths) - lengths, lengths)

    def __len__(self) -> int:
        return len(self.example_id)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """A sort key an example: context length first, then response length below :data:`CONTEXT_UNIT`."""
        return self.context.lengths * CONTEXT_UNIT + self.response.lengths

    def batches(self, rows_NB: NDArray[np.int64], draws: "Draws", widths: Widths) -> dict[str, Arrays]:
        """The fields of N :class:`arplus.model.batch.Batch` of B examples by name, all but ``counted_B``."""
        ids = self.characters
        N, B = rows_NB.shape
        rows = rows_NB.ravel()

        def padded(lists: Ragged, rows: NDArray[np.int64], multiple: int, pad: int) -> Arrays:
            widths_N = _round_up(lists.lengths[rows].reshape(N, -1).max(1), multiple)
            per_batch = len(rows) // N
            values = lists.padded(rows, np.repeat(widths_N, per_batch), pad)
            return Arrays(values, [(per_batch, width) for width in widths_N.tolist()])

        numbers = padded(self.profiles_of_example, rows, widths.profiles, len(self.profile.lengths) - 1)

        response_lengths = self.response.lengths[rows]
        longest = np.full(len(rows), response_lengths.max())
        characters = self.response.padded(rows, longest, ids.pad).reshape(len(rows), -1)
        framed = frame(characters, response_lengths, ids)
        own_place = np.arange(len(rows))

        fields = {
            "example_id_B": Arrays(self.example_id[rows], [(B,)] * N),
            "context_BS": padded(self.context, rows, widths.context, ids.pad),
            "context_profile_BS": padded(self.context_profile, rows, widths.context, 0),
            "profiles_BPW": self._profiles(numbers, widths.persona),
            "target_persona_BK": padded(self.target, rows, widths.persona, self.persona_pad),
            "response_BT": padded(Ragged.of_rows(framed, response_lengths + 2), own_place, widths.response, ids.pad),
        }
        if self.layout.infilling:
            infilled = infill(framed, response_lengths + 2, ids, *draws.uniform(self.example_id[rows]))
            lists = Ragged.of_rows(infilled, (infilled != ids.pad).sum(1))
            fields["infilled_BU"] = padded(lists, own_place, widths.response, ids.pad)
        return fields

    def _profiles(self, numbers: Arrays, multiple: int) -> Arrays:
        """The items of every batch's profiles, from their numbers (B, P)."""
        profiles_N = np.array([B * P for B, P in numbers.shapes])
        lengths = self.profile.lengths[numbers.values]
        widths_N = _round_up(np.maximum.reduceat(lengths, np.cumsum(profiles_N) - profiles_N), multiple)
        values = self.profile.padded(numbers.values, np.repeat(widths_N, profiles_N), self.persona_pad)
        return Arrays(values, [(*shape, width) for shape, width in zip(numbers.shapes, widths_N.tolist(), strict=True)])

    def batch(
        self, rows_B: NDArray[np.int64], counted_B: NDArray[np.bool_], draws: "Draws", widths: Widths = EXACT
    ) -> dict[str, NDArray]:
        """The arrays of one batch of examples ``rows_B``, by field name.

        ``counted_B`` is False for rows that only fill the batch up.
        """
        fields = self.batches(rows_B[None], draws, widths)
        return {"counted_B": counted_B} | {name: values.reshape(*shapes) for name, (values, shapes) in fields.items()}


def _round_up(widths: NDArray[np.int64], multiple: int) -> NDArray[np.int64]:
    return -(-np.maximum(widths, 1) // multiple) * multiple


def frame(characters_BL: Int, lengths_B: NDArray[np.int64], ids: SpecialIds) -> Int:
    """[BOS] + characters + [EOS] of padded responses."""
    B, width = characters_BL.shape
    response_BT = np.full((B, width + 2), ids.pad, np.int32)
    response_BT[:, 0] = ids.bos
    response_BT[:, 1:-1] = characters_BL
    response_BT[np.arange(B), lengths_B + 1] = ids.eos
    width = int(lengths_B.max()) + 2
    return response_BT[:, :width]


def infill(
    response_BT: Int,
    lengths_B: NDArray[np.int64],
    ids: SpecialIds,
    kind_B: NDArray[np.float64],
    place_B: NDArray[np.float64],
) -> Int:
    """BART-style infilling: one span of every response is replaced by one [MASK] (guide: Auxiliary task).

    For a length l with [BOS] and [EOS]: l = 3 stays; l = 4 or 5 masks one character; l ≥ 6 masks two, or with
    probability 0.01 inserts a [MASK]. The span starts uniformly in 1 … l − span − 1, so that [BOS] and [EOS] stay.
    ``kind_B`` and ``place_B`` are uniform draws in [0, 1).
    """
    l_B = lengths_B
    span_B = np.where(l_B >= 6, np.where(kind_B < 0.99, 2, 0), 1)
    start_B = 1 + np.floor(place_B * (l_B - span_B - 1)).astype(np.int64)
    unchanged_B = l_B < 4
    start_B = np.where(unchanged_B, l_B, start_B)
    width = int(np.where(unchanged_B, l_B, l_B - span_B + 1).max())
    column = np.arange(width)
    source = np.where(column > start_B[:, None], column + span_B[:, None] - 1, column)
    padded_BT = np.pad(response_BT, ((0, 0), (0, 2)), constant_values=ids.pad)
    infilled_BU = np.take_along_axis(padded_BT, np.minimum(source, padded_BT.shape[1] - 1), axis=1)
    infilled_BU[column == start_B[:, None]] = ids.mask
    # In an unchanged row start = l is the first position of its padding.
    return np.where(unchanged_B[:, None] & (column >= l_B[:, None]), np.int32(ids.pad), infilled_BU)


class Draws(NamedTuple):
    """Random numbers that depend on (seed, epoch, example id) alone: not on the worker, batch or order."""

    seed: int
    epoch: int

    def uniform(self, example_id_B: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Two independent draws in [0, 1) for every example."""
        key = _mix(_mix(np.array([self.seed], np.uint64)) ^ np.uint64(self.epoch))
        first = _mix(example_id_B.view(np.uint64) ^ key)
        return _unit(first), _unit(_mix(first))


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The output function of SplitMix64 (Steele et al. 2014): a good hash of 64 bits to 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _unit(x: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _ragged(column: pa.ChunkedArray) -> Ragged:
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks)
    offsets = array.offsets.to_numpy().astype(np.int64)
    values = array.flatten().to_numpy()
    offsets = offsets - offsets[0]
    return Ragged(values, offsets[:-1], np.diff(offsets))
