"""Rows of encoded examples to batches, without a Python loop over rows or characters.

A :class:`Window` holds some thousand examples as flat arrays and offsets, the way Arrow stores them. All micro-batches
that are cut from it are gathered at once, each field by one indexing; :mod:`arplus.data.packing` makes tensors of them.
Dimensions are those of :mod:`arplus.model.batch`; R is the number of rows that are taken.
"""

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from arplus.config import ModelConfig, SpecialIds, VocabularySizes, special_ids
from arplus.data.hashes import mix
from arplus.data.ragged import Int, Lists, Ragged, offsets, ranges

if TYPE_CHECKING:
    from arplus.model.batch import Batch


class MicroBatches(NamedTuple):
    """The fields of consecutive micro-batches as flat arrays; see :class:`arplus.model.batch.Batch`."""

    examples: Int
    """Examples of each micro-batch; 0 is allowed."""
    profile_counts: Int
    """Profiles of each micro-batch."""
    example_id: Int
    context: Lists
    speaker: Int
    profiles: Lists
    persona: Lists
    response: Lists
    target: Int
    infilled: Lists | None
    persona_related: Int | None = None

    def narrowed(self) -> "MicroBatches":
        """The same in the smallest types that hold it."""
        return MicroBatches(*map(narrow, self))


def narrow(field: Any) -> Any:
    """Numbers from 0 on in the smallest type that holds them: moving them costs more than anything."""
    if isinstance(field, Lists):
        return Lists(*map(narrow, field))
    return None if field is None else field.astype(np.min_scalar_type(field.max(initial=0)))


@dataclass(frozen=True, kw_only=True)
class BatchSpec:
    """What a model reads of an example."""

    sizes: VocabularySizes
    """Sizes of the vocabularies that the ids belong to."""
    persona_words: bool
    """Personas as words of the persona vocabulary (MemN2N), else as characters."""
    infilling: bool
    """Whether the auxiliary task is infilling, so that batches carry infilled responses."""
    labels: bool = False
    """Whether a weight predictor is told which examples are about the responder's persona."""

    @classmethod
    def of(cls, model: ModelConfig, sizes: VocabularySizes) -> "BatchSpec":
        """What a model of this configuration reads."""
        return cls(
            sizes=sizes,
            persona_words=model.memory_hops > 0,
            infilling=model.auxiliary == "infilling",
            labels=model.persona_weight == "predicted",
        )

    @property
    def persona_columns(self) -> tuple[str, str, str]:
        """The columns of the profiles, of their item counts and of the target persona."""
        if self.persona_words:
            return "profile_words", "profile_word_counts", "target_words"
        return "profile_characters", "profile_character_counts", "target_characters"

    @property
    def columns(self) -> list[str]:
        """The columns of a data set file that a batch is made from."""
        labels = ["persona_related"] * self.labels
        return ["example_id", "context", "speakers", "response", *self.persona_columns, *labels]


class Window:
    """Examples in memory, ready to be cut into batches."""

    def __init__(self, table: pa.Table, spec: BatchSpec) -> None:
        self.spec = spec
        self.characters: SpecialIds = special_ids(spec.sizes.characters)
        profiles, counts, target = spec.persona_columns
        self.example_id: NDArray[np.int64] = table["example_id"].to_numpy()
        self.context = Ragged.of(table["context"])
        self.persona = Ragged.of(table[target])
        self.framed = frame(Ragged.of(table["response"]), self.characters)
        """[BOS] + characters + [EOS]."""
        # Every utterance ends with [SEP], so the number of [SEP] before a character is the index of its utterance.
        ends = self.context.values == self.characters.sep
        speakers = Ragged.of(table["speakers"]).values
        assert len(speakers) == int(ends.sum()), "every context utterance has a speaker and a [SEP]"
        self.speaker = speakers[np.cumsum(ends) - ends]
        """For each context character the local profile that speaks."""
        item_counts = Ragged.of(table[counts])
        self.profiles_of_example = item_counts._replace(values=np.arange(len(item_counts.values)))
        self.profile = Ragged.end_to_end(Ragged.of(table[profiles]).values, item_counts.values)
        """The profiles of all examples."""
        self.persona_related = table["persona_related"].to_numpy().astype(np.int32) if spec.labels else None

    def __len__(self) -> int:
        return len(self.example_id)

    @property
    def targets(self) -> NDArray[np.int64]:
        """Targets of each example: its characters and [EOS]."""
        return self.framed.lengths - 1

    def with_personas_of(self, rows_R: NDArray[np.int64]) -> "Window":
        """The same examples under other personas: example i answers as, and has as its own profile, that of rows_R[i].

        So the responder's persona is another one both in the memory and where the responder speaks in the context.
        """
        other = copy.copy(self)
        other.persona = self.persona._replace(starts=self.persona.starts[rows_R], lengths=self.persona.lengths[rows_R])
        numbers, own = self.profiles_of_example.values.copy(), self.profiles_of_example.starts
        numbers[own] = self.profiles_of_example.values[own[rows_R]]
        other.profiles_of_example = self.profiles_of_example._replace(values=numbers)
        return other

    def batch(self, rows_B: NDArray[np.int64], rng: "ExampleRng") -> "Batch":
        """Those rows in that order as one batch, whose sequences are one block."""
        from arplus.data.packing import ONE_BLOCK, unpack  # with torch, which the tasks of a feed do without

        return next(unpack(self.micro_batches(rows_B, np.array([len(rows_B)]), rng), ONE_BLOCK))

    def micro_batches(
        self, rows_R: NDArray[np.int64], examples_M: NDArray[np.int64], rng: "ExampleRng"
    ) -> MicroBatches:
        """Those rows in that order as M micro-batches, of ``examples_M`` each."""
        numbers, profiles_R = self.profiles_of_example.take(rows_R)
        profile_ends = offsets(profiles_R)
        # Profiles before each micro-batch, and at last all of them.
        profile_cuts = profile_ends[offsets(examples_M)]
        context, context_R = self.context.places(rows_R)
        first_profile = np.repeat(profile_ends[:-1] - np.repeat(profile_cuts[:-1], examples_M), context_R)
        response, response_R = self.framed._replace(lengths=self.targets).places(rows_R)
        infilled = None
        if self.spec.infilling:
            chosen = Ragged(self.framed.values, self.framed.starts[rows_R], self.framed.lengths[rows_R])
            infilled = infill(chosen, self.characters, *rng.uniform(self.example_id[rows_R]))
        return MicroBatches(
            examples=examples_M,
            profile_counts=np.diff(profile_cuts),
            example_id=self.example_id[rows_R],
            context=Lists(self.context.values[context], context_R),
            speaker=self.speaker[context] + first_profile,
            profiles=self.profile.take(numbers),
            persona=self.persona.take(rows_R),
            response=Lists(self.framed.values[response], response_R),
            target=self.framed.values[response + 1],
            infilled=infilled,
            persona_related=None if self.persona_related is None else self.persona_related[rows_R],
        )


def frame(characters: Ragged, ids: SpecialIds) -> Ragged:
    """[BOS] + characters + [EOS] of lists that lie end to end."""
    lengths = characters.lengths + 2
    framed = Ragged.end_to_end(np.empty(lengths.sum(), characters.values.dtype), lengths)
    framed.values[framed.starts] = ids.bos
    framed.values[framed.starts + lengths - 1] = ids.eos
    framed.values[ranges(framed.starts + 1, characters.lengths)] = characters.values
    return framed


def infill(responses: Ragged, ids: SpecialIds, kind_R: NDArray[np.float64], place_R: NDArray[np.float64]) -> Lists:
    """BART-style infilling: one span of every response is replaced by one [MASK].

    For a length l with [BOS] and [EOS]: l = 3 stays; l = 4 or 5 masks one character; l ≥ 6 masks two, or with
    probability 0.01 inserts a [MASK]. The span starts uniformly in 1 … l − span − 1, so that [BOS] and [EOS] stay.
    ``kind_R`` and ``place_R`` are uniform draws in [0, 1).
    """
    l_R = responses.lengths
    masked_R = l_R >= 4
    span_R = np.where(l_R >= 6, np.where(kind_R < 0.99, 2, 0), 1)
    start_R = 1 + np.floor(place_R * (l_R - span_R - 1)).astype(np.int64)
    # A response in two lists: up to the [MASK] and its place, and what follows the span.
    lengths_R2 = np.stack([start_R + 1, l_R - start_R - span_R], 1)
    lengths_R2[~masked_R] = np.stack([l_R, np.zeros_like(l_R)], 1)[~masked_R]
    starts_R2 = responses.starts[:, None] + np.stack([np.zeros_like(l_R), start_R + span_R], 1)
    halves = Ragged(responses.values, starts_R2.ravel(), lengths_R2.ravel())
    values, _ = halves.take(np.arange(2 * len(l_R)))
    lengths_R = lengths_R2.sum(1)
    values[(offsets(lengths_R)[:-1] + start_R)[masked_R]] = ids.mask
    return Lists(values, lengths_R)


class ExampleRng(NamedTuple):
    """Random numbers that depend on (seed, epoch, example id) alone: not on the worker, batch or order."""

    seed: int
    epoch: int

    def uniform(self, example_id_B: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Two independent draws in [0, 1) for every example."""
        key = _next(_next(np.array([self.seed], np.uint64)) ^ np.uint64(self.epoch))
        first = _next(example_id_B.view(np.uint64) ^ key)
        return _unit(first), _unit(_next(first))


def _next(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """What SplitMix64 gives next."""
    return mix(state + np.uint64(0x9E3779B97F4A7C15))


def _unit(x: NDArray[np.uint64]) -> NDArray[np.float64]:
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53
