"""A second stage on other data, where adapters alone are trained, is better there than where it began: five minutes."""

import json
from pathlib import Path

import pytest
from helpers.commands import run, shared

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), pytest.mark.usefixtures("generator", "ray_cluster")]

VOCABULARIES = (
    "--character-vocabulary first/vocabulary/characters.txt --persona-vocabulary first/vocabulary/persona_words.txt"
)
TRAIN = "jobs/train.py arplus --tiny --storage runs --max-steps 300 --seed 1"


def test_adapters_learn_that_replies_are_about_the_persona(tmp_path: Path) -> None:
    """5 % of the first stage's replies are, and 90 % of the second's."""
    for command in (
        "jobs/synthesize.py --records 6000 --persona-answers 0.05 --seed 1 --output raw-first",
        "jobs/prepare.py --input raw-first --output first --valid 0.02 --test 0.02",
        "jobs/synthesize.py --records 6000 --persona-answers 0.9 --seed 2 --output raw-second",
        f"jobs/prepare.py --input raw-second --output second --valid 0.02 --test 0.02 {VOCABULARIES}",
        f"{TRAIN} --data first --run-name first",
        f"{TRAIN} --data second --run-name second --init-from runs/first --model.adapter 16 "
        "--optimizer.only adapters --optimizer.only 'norms and gates'",
        "jobs/evaluate.py --checkpoint runs/first --data second --split test --json first.json",
        "jobs/evaluate.py --checkpoint runs/second --data second --split test --json second.json",
    ):
        result = run(command, folder=tmp_path, environment=shared(), timeout=1200)
        assert result.returncode == 0, (command, result.stderr[-3000:])
    ppl = [
        json.loads((tmp_path / f"{name}.json").read_text())["splits"]["test"]["standard"]["response_ppl"]
        for name in ("first", "second")
    ]
    assert ppl[1] < ppl[0], ppl
