"""The feed of Hugging Face's ``datasets`` and torch's ``DataLoader``, with batches made as projects that use them do.

It is given its rows decoded and in memory: dictionaries of Python lists, padded in Python.
"""

import os
import random
import time
from collections.abc import Iterator
from itertools import islice
from statistics import median
from typing import Any

import pyarrow as pa
import torch
from torch.utils.data import DataLoader

from arplus.benchmark.figures import NOT_INSTALLED
from arplus.config import special_ids
from arplus.data.collate import BatchSpec, Window
from arplus.data.sampler import EpochSampler


def examples_per_second(sampler: EpochSampler, spec: BatchSpec, steps: int) -> float | str:
    """Examples per second on the first ``steps`` of our batches, or why there is no figure.

    Measured in this process and with a process per core; the faster one counts.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: nothing here needs the network
    try:
        import datasets
    except ImportError:
        return NOT_INSTALLED
    tables, batches = first_batches(sampler, spec, steps)
    rows = datasets.Dataset(datasets.table.InMemoryTable(pa.concat_tables(tables).combine_chunks()))
    best = 0.0
    for workers in (0, os.cpu_count() or 1):
        loader: Any = DataLoader(
            rows,
            batch_sampler=batches,
            collate_fn=Collate(spec),
            num_workers=workers,
            persistent_workers=workers > 0,
        )
        best = max(best, median([*_rates(loader, 4)][1:]))
    return best


def first_batches(sampler: EpochSampler, spec: BatchSpec, steps: int) -> tuple[list[pa.Table], list[list[int]]]:
    """The windows of an epoch's first ``steps`` batches, and the rows of these batches in the windows' table."""
    tables: list[pa.Table] = []
    batches: list[list[int]] = []
    for window in range(min(-(-steps // sampler.window_batches), sampler.windows)):
        first = sum(map(len, tables))
        tables.append(sampler.read(0, window, spec.columns))
        lengths = Window(tables[-1], spec).context.lengths
        batches += [(first + rows).tolist() for rows in sampler.batches(0, window, lengths)]
    return tables, list(islice(batches, steps))


def _rates(loader: "DataLoader[dict[str, torch.Tensor]]", passes: int) -> Iterator[float]:
    for _ in range(passes):
        start = time.perf_counter()
        examples = sum(len(batch["context_BS"]) for batch in loader)
        yield examples / (time.perf_counter() - start)


class Collate:
    """Rows as dictionaries of lists to padded tensors, in plain Python; a ``collate_fn`` of a ``DataLoader``."""

    def __init__(self, spec: BatchSpec) -> None:
        self.spec = spec
        self.ids = special_ids(spec.sizes.characters)
        persona_size = spec.sizes.persona_words if spec.persona_words else spec.sizes.characters
        self.persona_pad = special_ids(persona_size).pad

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """The fields of a :class:`arplus.model.batch.Batch` as rectangles; the infilled spans are other ones."""
        profile_column, count_column, target_column = self.spec.persona_columns
        pad = self.ids.pad
        responses = [[self.ids.bos, *row["response"], self.ids.eos] for row in rows]
        profiles = [self._profiles(row[profile_column], row[count_column]) for row in rows]
        n_profiles = max(map(len, profiles))
        flat = _padded([p for of_row in profiles for p in (of_row + [[]] * n_profiles)[:n_profiles]], self.persona_pad)
        tensors = {
            "example_id_B": torch.tensor([row["example_id"] for row in rows]),
            "context_BS": _padded([row["context"] for row in rows], pad),
            "context_profile_BS": _padded([self._speakers(row) for row in rows], 0),
            "profiles_BPW": flat.view(len(rows), n_profiles, -1),
            "target_persona_BK": _padded([row[target_column] for row in rows], self.persona_pad),
            "response_BT": _padded(responses, pad),
        }
        if self.spec.infilling:
            tensors["infilled_BU"] = _padded([self._infilled(response) for response in responses], pad)
        return tensors

    def _speakers(self, row: dict[str, Any]) -> list[int]:
        speakers = []
        utterance = 0
        for character in row["context"]:
            speakers.append(row["speakers"][utterance])
            utterance += character == self.ids.sep
        return speakers

    def _profiles(self, items: list[int], counts: list[int]) -> list[list[int]]:
        profiles, start = [], 0
        for count in counts:
            profiles.append(items[start : start + count])
            start += count
        return profiles

    def _infilled(self, response: list[int]) -> list[int]:
        if len(response) < 4:
            return response
        span = 1 if len(response) < 6 else 2 if random.random() < 0.99 else 0
        start = random.randint(1, len(response) - span - 1)
        return [*response[:start], self.ids.mask, *response[start + span :]]


def _padded(lists: list[list[int]], pad: int) -> torch.Tensor:
    width = max(1, *map(len, lists))
    return torch.tensor([values + [pad] * (width - len(values)) for values in lists], dtype=torch.int32)
