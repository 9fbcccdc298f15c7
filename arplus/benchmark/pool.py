"""Examples with the lengths of PersonalDialog's, in memory, and the batches that both sides of a comparison take.

Ours are cut from a window of the feed: sorted by length, a few of them evenly spaced, since they differ several times
in cost. The other side's are random ones, as a plain ``DataLoader`` with ``shuffle=True`` would make them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Annotated

import numpy as np
import pyarrow as pa
from annotated_types import Gt
from numpy.typing import NDArray

from arplus import storage
from arplus.benchmark.report import Output
from arplus.config import ExampleRules, FeedConfig, ModelConfig, VocabularySizes, special_ids
from arplus.data.collate import EXACT, Draws, Layout, Widths, Window
from arplus.data.dataset import Dataset, Split
from arplus.data.examples import SCHEMA
from arplus.data.feed import Order, Step, as_batch
from arplus.model.batch import Batch

UTTERANCES = {1: 0.45, 3: 0.27, 5: 0.14, 7: 0.14}
"""Utterances of a context, and how often. With the lengths below a context has 33.6 characters on average and a
response 11.4 targets, and random batches of 64 are 65 % and 28 % padding: what training examples were found to have."""
LENGTH_MU, LENGTH_SIGMA, LONGEST = 2.42, 0.87, ExampleRules.max_utterance_characters
"""Characters of an utterance: lognormal, cut at the longest."""
ITEMS = {3: 0.42, 4: 0.25, 6: 0.2, 9: 0.13}
"""Words of a profile, gender and place included, and how often."""


def random_examples(n: int, sizes: VocabularySizes, seed: int = 0) -> pa.Table:
    """``n`` examples of two profiles (:data:`arplus.data.examples.SCHEMA`); characters follow Zipf's law."""
    random = np.random.default_rng(seed)
    sep = special_ids(sizes.characters).sep

    def characters(count: int) -> list[int]:
        return _zipf(random, count, special_ids(sizes.characters).pad).tolist()

    def utterance() -> list[int]:
        return characters(int(np.clip(np.exp(random.normal(LENGTH_MU, LENGTH_SIGMA)), 1, LONGEST)))

    rows = []
    for i, turns in enumerate(_choices(random, UTTERANCES, n)):
        words = [
            _zipf(random, items, special_ids(sizes.persona_words).pad).tolist() for items in _choices(random, ITEMS, 2)
        ]
        spelled = [characters(2 * len(profile)) for profile in words]
        rows.append(
            {
                "example_id": i,
                "context": [c for _ in range(turns) for c in (*utterance(), sep)],
                "speakers": [(turns - t) % 2 for t in range(turns)],
                "response": utterance(),
                "profile_words": list(chain(*words)),
                "profile_word_counts": [len(profile) for profile in words],
                "profile_characters": list(chain(*spelled)),
                "profile_character_counts": [len(profile) for profile in spelled],
                "target_words": [0, words[0][0], 1, words[0][1], 2, *words[0][2:]],
                "target_characters": spelled[0],
            }
        )
    return pa.Table.from_pylist(rows, SCHEMA)


def examples_of(uri: str, n: int) -> pa.Table:
    """The first window of ``n`` examples of a prepared data set's training split."""
    split = Dataset.open(storage.absolute(uri)).split("train")
    order = Order(split=split, batch_size=n, window_batches=1, seed=0, shuffled=True)
    return order.read(0, 0, SCHEMA.names)


@dataclass(frozen=True, kw_only=True)
class PoolBenchmark(Output):
    """What the benchmarks that take batches of a pool have in common."""

    data: str | None = None
    """URI of a prepared data set to take the examples from; by default they are random ones of real lengths."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples a batch."""
    window_batches: Annotated[int, Gt(0)] = FeedConfig.window_batches
    """Batches of the window that is sorted by length; see jobs/train.py."""
    batches: Annotated[int, Gt(0)] = 8
    """How many of them, evenly spaced, are timed in every round."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.batches > self.window_batches:
            yield "batches", f"must be at most window_batches = {self.window_batches} (got {self.batches})"

    def pool(self, model: ModelConfig, sizes: VocabularySizes, widths: Widths = EXACT) -> "Pool":
        """The window's examples for a model; sorted batches are padded to ``widths``."""
        examples = self.window_batches * self.batch_size
        table = examples_of(self.data, examples) if self.data else random_examples(examples, sizes)
        return Pool(table, model, sizes, self.batch_size, widths)


class Pool:
    """A window of examples, and batches of it."""

    def __init__(
        self, table: pa.Table, model: ModelConfig, sizes: VocabularySizes, batch_size: int, widths: Widths = EXACT
    ) -> None:
        self.window = Window(table, Layout.of(model, sizes))
        self.batch_size, self.widths = batch_size, widths
        self.pad = special_ids(sizes.characters).pad

    def sorted(self, count: int) -> list[Step]:
        """Batches as the feed cuts them: of all that the window has, ``count`` evenly spaced ones by cost."""
        n = len(self.window) // self.batch_size * self.batch_size
        split = Split("pool", n, n, ())
        order = Order(split=split, batch_size=self.batch_size, window_batches=n, seed=0, shuffled=False)
        batches = order.batches(0, 0, self.window.lengths[:n])
        # A slot of the response costs three times as much as one of the context.
        slots = [int(self.window.context.lengths[b].max() + 3 * self.window.response.lengths[b].max()) for b in batches]
        places = ((np.arange(count) + 0.5) * len(batches) / count).astype(np.int64)
        return [self._step(batches[i], self.widths) for i in np.argsort(slots, kind="stable")[places]]

    def random(self, count: int, seed: int = 0) -> list[Step]:
        """Batches of random examples."""
        rows = np.random.default_rng(seed).permutation(len(self.window))
        return [self._step(rows[i * self.batch_size :][: self.batch_size], EXACT) for i in range(count)]

    def _step(self, rows: NDArray[np.int64], widths: Widths) -> Step:
        batch = as_batch(self.window.batch(rows, np.ones(len(rows), bool), Draws(0, 0), widths))
        return Step([batch], int((batch.response_BT[:, 1:] != self.pad).sum()))

    def padding(self, steps: list[Step]) -> float:
        """Share of the context slots of batches that is padding."""
        contexts = [batch.context_BS for step in steps for batch in step.micro_batches]
        return 1 - sum(int((c != self.pad).sum()) for c in contexts) / sum(c.numel() for c in contexts)


def real_lengths(batches: list[Batch], pad: int, persona_pad: int) -> tuple[float, float, float]:
    """Mean real context characters, targets and target persona words of an example."""
    examples = sum(len(batch.context_BS) for batch in batches)
    context = sum(int((batch.context_BS != pad).sum()) for batch in batches)
    targets = sum(int((batch.response_BT[:, 1:] != pad).sum()) for batch in batches)
    persona = sum(int((batch.target_persona_BK != persona_pad).sum()) for batch in batches)
    return context / examples, targets / examples, persona / examples


def _choices(random: np.random.Generator, shares: dict[int, float], n: int) -> list[int]:
    return random.choice(list(shares), size=n, p=list(shares.values())).tolist()


def _zipf(random: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """``count`` ids below ``size``, id i about in proportion to 1 / (i + 1)."""
    return (size ** random.random(count)).astype(np.int64) - 1
