"""Examples with the lengths of PersonalDialog's, in memory, and the batches that all sides of a comparison take."""

from itertools import chain

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from arplus import storage
from arplus.benchmark.options import PoolBenchmark
from arplus.config import ExampleRules, ModelConfig, VocabularySizes, special_ids
from arplus.data.collate import BatchSpec, ExampleRng, Window
from arplus.data.dataset import Dataset
from arplus.data.examples import SCHEMA
from arplus.data.loader import Step
from arplus.data.packing import unpack
from arplus.data.sampler import EpochSampler
from arplus.errors import UsageError
from arplus.model.batch import Batch, Sequences

UTTERANCES = {1: 0.45, 3: 0.27, 5: 0.14, 7: 0.14}
"""Utterances of a context, and how often. With the lengths below a context has 33.6 characters on average and a
response 11.4 targets; padded to their longest, random batches of 64 would be 65 % and 28 % padding: what training
examples were found to have."""
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


def examples_of(dataset: Dataset, n: int) -> pa.Table:
    """``n`` examples of a prepared data set's training split. Raises :class:`UsageError` where it has fewer."""
    split = dataset.split("train")
    if split.examples < n:
        raise UsageError(
            f"--data {dataset.uri}: has {split.examples} training examples, and this benchmark takes {n}; "
            "lower --batch-size, --batches or --rounds, or leave --data out"
        )
    return EpochSampler(split=split, batch_size=n, window_batches=1, seed=0, shuffled=True).read(0, 0, SCHEMA.names)


def pool_of(config: PoolBenchmark, model: ModelConfig, examples: int) -> "Pool":
    """So many examples for a model, of the data set that is named or random ones."""
    if config.data:
        dataset = Dataset.open(storage.absolute(config.data))
        return Pool(examples_of(dataset, examples), model, dataset.sizes, config.batch_size, dataset.rules)
    sizes = VocabularySizes()
    return Pool(random_examples(examples, sizes), model, sizes, config.batch_size)


class Pool:
    """Examples, and batches of them; ``sizes`` are those of their vocabularies, ``rules`` bound their lengths."""

    def __init__(
        self,
        table: pa.Table,
        model: ModelConfig,
        sizes: VocabularySizes,
        batch_size: int,
        rules: ExampleRules = ExampleRules(),  # noqa: B008, which is frozen
    ) -> None:
        self.window = Window(table, BatchSpec.of(model, sizes))
        self.sizes, self.rules, self.batch_size = sizes, rules, batch_size

    def random(self, count: int, seed: int = 0) -> list[Step]:
        """``count`` batches of random examples, no example twice: the steps of one training worker."""
        rows = np.random.default_rng(seed).permutation(len(self.window))[: count * self.batch_size]
        lengths = self.window.context.lengths
        batches = [part[np.argsort(lengths[part], kind="stable")] for part in rows.reshape(count, self.batch_size)]
        sizes_N = np.full(count, self.batch_size)
        found = unpack(self.window.micro_batches(np.concatenate(batches), sizes_N, ExampleRng(0, 0)))
        return [Step([batch], len(batch.target_N)) for batch in found]

    def by_length(self, count: int) -> list[Batch]:
        """``count`` batches as evaluation takes them: evenly spaced ones of all examples in order of context length."""
        rows = np.argsort(self.window.context.lengths, kind="stable")
        places = ((np.arange(count) + 0.5) * (len(rows) // self.batch_size) / count).astype(np.int64)
        taken = (rows[i * self.batch_size :][: self.batch_size] for i in places)
        return [self.window.batch(rows_B, ExampleRng(0, 0)) for rows_B in taken]


def padding(batches: list[Batch]) -> float:
    """Share of the contexts' places that is padding where each batch is padded to its longest."""
    contexts: list[Sequences] = [batch.context.sequences for batch in batches]
    real = sum(int(context.lengths.sum()) for context in contexts)
    return 1 - real / sum(len(context) * int(context.lengths.max()) for context in contexts)


def mean_lengths(batches: list[Batch]) -> tuple[float, float, float]:
    """Mean context characters, targets and words of the responder's persona per example."""
    examples = sum(len(batch.example_id_B) for batch in batches)
    tokens = ((len(batch.context.ids), len(batch.target_N), len(batch.persona.ids)) for batch in batches)
    context, targets, persona = (sum(column) / examples for column in zip(*tokens, strict=True))
    return context, targets, persona


def _choices(random: np.random.Generator, shares: dict[int, float], n: int) -> list[int]:
    return random.choice(list(shares), size=n, p=list(shares.values())).tolist()


def _zipf(random: np.random.Generator, count: int, size: int) -> NDArray[np.int64]:
    """``count`` ids below ``size``, id i about in proportion to 1 / (i + 1)."""
    return (size ** random.random(count)).astype(np.int64) - 1
