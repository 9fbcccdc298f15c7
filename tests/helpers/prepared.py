"""A prepared data set of random examples and a random model, for tests that do not need the jobs that make them."""

from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from arplus import storage
from arplus.config import ExampleRules, preset, special_ids, tiny
from arplus.data.dataset import Dataset
from arplus.data.examples import SCHEMA
from arplus.data.manifest import DataFile, FilesLeftOut, InputFacts, Manifest, SplitFacts
from arplus.data.sessions import DUPLICATE_KEYS
from arplus.model.network import PersonaTransformer
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.text import Vocabulary, sizes

CHARACTERS = Vocabulary([chr(0x4E00 + i) for i in range(40)])
PERSONA_WORDS = Vocabulary(["性别", "地址", "兴趣", "男", "女", *(f"词{i}" for i in range(20))])


def random_examples(ids: range, seed: int = 0) -> pa.Table:
    """Valid examples of two profiles with the given ids."""
    random = np.random.default_rng([seed, ids.start])
    sep = special_ids(CHARACTERS.size).sep
    rows = []
    for i in ids:
        turns = int(random.integers(1, 8))
        utterances = [[*random.integers(0, 40, random.integers(1, 16)).tolist(), sep] for _ in range(turns)]
        words = [random.integers(3, 25, random.integers(3, 7)).tolist() for _ in range(2)]
        spelled = [random.integers(0, 40, random.integers(3, 12)).tolist() for _ in range(2)]
        rows.append(
            {
                "example_id": i,
                "context": list(chain(*utterances)),
                "speakers": [(turns - t) % 2 for t in range(turns)],
                "response": random.integers(0, 40, random.integers(1, 16)).tolist(),
                "profile_words": list(chain(*words)),
                "profile_word_counts": [len(w) for w in words],
                "profile_characters": list(chain(*spelled)),
                "profile_character_counts": [len(s) for s in spelled],
                "target_words": [0, *words[0][:1], 1, *words[0][1:2], 2, *words[0][2:]],
                "target_characters": spelled[0],
                "persona_related": i % 3 == 0,
            }
        )
    return pa.Table.from_pylist(rows, SCHEMA)


def make_manifest(splits: dict[str, SplitFacts], **facts: Any) -> Manifest:
    """A manifest of these splits; what is not given is nothing."""
    nothing: dict[str, Any] = dict.fromkeys(("records", "sessions", "uid_missing", "blank_lines"), 0)
    nothing |= {
        name: {}
        for name in ("rejected", "overlaps", "examples_left_out", "evaluation_sets", "profiles_cut", "settings")
    }
    nothing |= {
        "fingerprint": "test",
        "source": InputFacts(input="", files=0, files_left_out=FilesLeftOut(0, [])),
        "duplicates": dict.fromkeys(DUPLICATE_KEYS, 0),
        "duplicate_key": "dialogue",
        "rules": ExampleRules(),
        "vocabulary": sizes(CHARACTERS, PERSONA_WORDS),
    }
    return Manifest(splits=splits, **nothing | facts)


def write_dataset(folder: Path, files: dict[str, list[list[int]]], fingerprint: str = "test") -> Dataset:
    """Writes splits as files of row groups of the given sizes; example ids count up within a split."""
    splits = {}
    for split, parts in files.items():
        described, start = [], 0
        for number, groups in enumerate(parts):
            path = f"{split}/part-{number:05d}.parquet"
            (folder / split).mkdir(parents=True, exist_ok=True)
            with pq.ParquetWriter(folder / path, SCHEMA) as writer:
                for rows in groups:
                    writer.write_table(random_examples(range(start, start + rows)), row_group_size=rows)
                    start += rows
            described.append(DataFile(path=path, rows=sum(groups), row_groups=groups, digest=""))
        splits[split] = SplitFacts(sessions=start, examples=start, files=described)
    storage.write_bytes(str(folder / "vocabulary" / "characters.txt"), CHARACTERS.to_bytes())
    storage.write_bytes(str(folder / "vocabulary" / "persona_words.txt"), PERSONA_WORDS.to_bytes())
    labels = {name: {"asked": -(-split.examples // 3)} for name, split in splits.items()}
    make_manifest(splits, fingerprint=fingerprint, persona_related=labels).write(str(folder))
    return Dataset.open(str(folder))


def random_state(preset_name: str = "arplus", characters: Vocabulary = CHARACTERS) -> TrainState:
    """A model of random weights; the gates of ReZero are opened, so that every part of it matters."""
    torch.manual_seed(0)
    config = tiny(preset(preset_name))
    model = PersonaTransformer(config.model, sizes(characters, PERSONA_WORDS))
    for name, parameter in model.named_parameters():
        if name.endswith(".r"):
            parameter.data.fill_(0.5)
    return TrainState(
        config=config,
        progress=TrainProgress(fingerprint="test"),
        schedule={},
        rules=ExampleRules(),
        characters=characters,
        persona_words=PERSONA_WORDS,
        weights=model.weights(),
        moments={},
    )
