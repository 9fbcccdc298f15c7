"""Vectors of generated dialogues: words that stand in the same places are neighbours. About a minute."""

from pathlib import Path

import pytest
from helpers.commands import run, shared

from arplus.data.dataset import Dataset
from arplus.pretrained import vectors
from arplus.text import FEMALE, MALE

pytestmark = [pytest.mark.soak, pytest.mark.timeout(900), pytest.mark.usefixtures("generator", "ray_cluster")]


def test_a_run_starts_from_vectors_in_which_the_genders_are_neighbours(tmp_path: Path) -> None:
    pytest.importorskip("gensim", reason="pip install -e '.[vectors]'")
    for command in (
        "jobs/synthesize.py --records 20000 --persona-answers 0.9 --output raw",
        "jobs/prepare.py --input raw --output data",
        "jobs/vectors.py --data data --output vectors.txt --size 64",
        "jobs/train.py arplus --tiny --data data --max-steps 4 --init.character-vectors vectors.txt",
    ):
        result = run(command, folder=tmp_path, environment=shared(), timeout=600)
        assert result.returncode == 0, (command, result.stderr[-3000:])
    assert "% of the text, start from" in result.stderr
    characters = Dataset.open(str(tmp_path / "data")).characters
    found = vectors.read(str(tmp_path / "vectors.txt"), characters)
    unit_NE = found.vectors_NE / (found.vectors_NE**2).sum(1, keepdims=True) ** 0.5
    tokens = [characters.token(int(i)) for i in found.ids_N]
    for mine, other in ((MALE, FEMALE), (FEMALE, MALE)):
        near = (unit_NE @ unit_NE[tokens.index(mine)]).argsort()[::-1][1:11]
        assert other in [tokens[i] for i in near]
