"""A prepared data set is what its manifest says, or is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from arplus.config import ExampleRules, to_dict
from arplus.data.dataset import FORMAT, Dataset, RowGroup
from arplus.errors import UsageError

MANIFEST: dict[str, Any] = {
    "format": FORMAT,
    "rules": to_dict(ExampleRules()),
    "fingerprint": "abc",
    "splits": {
        "train": {
            "sessions": 9,
            "examples": 30,
            "files": [
                {"path": "train/part-00000.parquet", "rows": 20, "row_groups": [12, 8]},
                {"path": "train/part-00001.parquet", "rows": 10, "row_groups": [10]},
            ],
        },
        "valid": {"sessions": 0, "examples": 0, "files": []},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "vocabulary").mkdir()
    (tmp_path / "vocabulary" / "characters.txt").write_text("的\t3\n")
    (tmp_path / "vocabulary" / "persona_words.txt").write_text("男\t2\n女\t1\n")
    (tmp_path / "manifest.json").write_text(json.dumps(MANIFEST))
    return tmp_path


def test_a_data_set_is_what_its_manifest_says(folder: Path) -> None:
    dataset = Dataset.open(str(folder))
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


def test_a_folder_without_manifest_or_of_another_format_is_refused(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({**MANIFEST, "format": FORMAT + 1}))
    with pytest.raises(UsageError, match=rf"format {FORMAT + 1}; this version reads {FORMAT}"):
        Dataset.open(str(folder))
    for foreign in ({"entries": []}, [1]):
        (folder / "manifest.json").write_text(json.dumps(foreign))
        with pytest.raises(UsageError, match=r"not a prepared data set \(manifest.json is not ours\)"):
            Dataset.open(str(folder))
    (folder / "manifest.json").unlink()
    with pytest.raises(UsageError, match=r"no manifest.json.*jobs/prepare.py"):
        Dataset.open(str(folder))
