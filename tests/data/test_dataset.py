"""A data set is what its manifest says, and a manifest is read whole or refused by name."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.prepared import make_manifest

from arplus.config import PRESETS
from arplus.data.dataset import Dataset, RowGroup
from arplus.data.manifest import FORMAT, DataFile, SplitFacts
from arplus.errors import UsageError

FILES = [
    DataFile(path="train/part-00000.parquet", rows=20, row_groups=[12, 8], digest="d0"),
    DataFile(path="train/part-00001.parquet", rows=10, row_groups=[10], digest="d1"),
]
MANIFEST = make_manifest(
    {
        "train": SplitFacts(sessions=9, examples=30, files=FILES),
        "valid": SplitFacts(sessions=0, examples=0, files=[]),
    },
    fingerprint="abc",
    rejected={"gender": 2},
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "characters.txt").write_text("的\t3\n")
    (tmp_path / "vocabulary" / "persona_words.txt").write_text("男\t2\n女\t1\n")
    MANIFEST.write(str(tmp_path))
    return tmp_path


def rewrite(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_data_set_is_what_its_manifest_says(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
    assert dataset.manifest == MANIFEST
    assert dataset.fingerprint == "abc"
    assert (dataset.characters.size, dataset.persona_words.size) == (10, 11)
    train = dataset.split("train")
    assert (train.sessions, train.examples) == (9, 30)
    first, second = f"{folder}/train/part-00000.parquet", f"{folder}/train/part-00001.parquet"
    assert train.row_groups == (RowGroup(first, 0, 12), RowGroup(first, 1, 8), RowGroup(second, 0, 10))
    assert dataset.split("valid").row_groups == ()


def test_an_unknown_split_is_an_error_that_lists_the_splits(folder: Path) -> None:
    with pytest.raises(UsageError, match="no split 'dev'; it has train, valid"):
        Dataset.open(str(folder)).split("dev")


def test_data_without_labels_trains_no_predictor(folder: Path) -> None:
    plain, weighted = (PRESETS[name].model for name in ("arplus", "arplus-weighted"))
    for labels, problem in (
        ({}, "--data .*: has no labels for --model.persona-weight predicted.*; prepare it again"),
        ({"train": {"asked": 0}}, "no training example is about the responder's persona.*; train with --model"),
    ):
        replace(MANIFEST, persona_related=labels).write(str(folder))
        dataset = Dataset.open(str(folder))
        dataset.check_labels(plain)
        with pytest.raises(UsageError, match=problem):
            dataset.check_labels(plain, weighted)
    dataset.check_labels(weighted, training=False)


def test_a_folder_without_manifest_or_of_another_format_is_refused(folder: Path) -> None:
    rewrite(folder, format=FORMAT + 1)
    with pytest.raises(UsageError, match=rf"format {FORMAT + 1}; this version reads {FORMAT}"):
        Dataset.open(str(folder))
    for foreign in ({"entries": []}, [1]):
        (folder / "manifest.json").write_text(json.dumps(foreign))
        with pytest.raises(UsageError, match=r"not a prepared data set \(manifest.json is not ours\)"):
            Dataset.open(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"no manifest.json.*jobs/prepare.py"):
        Dataset.open(str(folder))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"records": "many"}, "records: must be a valid integer"),
        ({"splits": {"train": {"sessions": 1, "files": []}}}, "splits.*field required"),
        ({"rules": {"max_utterance_letters": 15}}, "unknown key 'rules.max_utterance_letters'"),
        ({"colour": "red"}, "unknown key 'colour'"),
    ],
)
def test_a_manifest_with_something_else_in_it_is_refused_by_name(folder: Path, changes: Any, problem: str) -> None:
    rewrite(folder, **changes)
    with pytest.raises(UsageError, match=f"{folder}/manifest.json: .*{problem}"):
        Dataset.open(str(folder))
