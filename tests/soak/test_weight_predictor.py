"""A weight predictor learns which replies are about the persona, and is of use: ten minutes on two quiet cores."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import ROOT, run, shared

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600), pytest.mark.usefixtures("generator", "ray_cluster")]

PRESETS = {
    "arplus": "arplus-weighted --tiny",
    "no-memn2n": "no-memn2n --tiny --model.persona-weight predicted",
}


def done(command: str, folder: Path) -> str:
    """What a job says that ends well."""
    result = run(command, folder=folder, environment=shared(), timeout=1500)
    assert result.returncode == 0, (command, result.stderr[-3000:])
    return result.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 % of the exchanges are about the responder's persona."""
    folder = tmp_path_factory.mktemp("predictor")
    done("jobs/synthesize.py --records 20000 --persona-answers 0.3 --seed 1 --output raw", folder)
    done("jobs/prepare.py --input raw --output data --valid 0.02 --test 0.05", folder)
    return folder


@pytest.mark.parametrize("name", PRESETS)
def test_its_weights_tell_the_replies_apart_and_are_better_than_any_other(folder: Path, name: str) -> None:
    run = f"--data data --storage runs --run-name {name} --max-steps 600 --seed 1"
    assert "L_W" in done(f"jobs/train.py {PRESETS[name]} {run}", folder)
    found: dict[str, dict[str, Any]] = {}
    for weight in ("auto", "0", "1"):
        done(
            f"jobs/evaluate.py --checkpoint runs/{name} --data data --split test --persona-weight {weight} "
            f"--json {name}-{weight}.json",
            folder,
        )
        found[weight] = json.loads((folder / f"{name}-{weight}.json").read_text())["splits"]["test"]
    predictor = found["auto"]["predictor"]
    assert 0.2 < predictor["share"] < 0.4
    assert predictor["auc"] >= 0.98
    assert predictor["mean_a_at_1"] >= 0.8
    assert predictor["mean_a_at_0"] <= 0.1
    ppl = {weight: result["standard"]["response_ppl"] for weight, result in found.items()}
    assert ppl["auto"] < min(ppl["0"], ppl["1"])


def test_a_weight_of_0_silences_a_persona(tmp_path: Path) -> None:
    """Of the demo's model, which was trained at 1: what is left is chance."""
    commands = (ROOT / "Makefile").read_text().replace("$(DEMO)/", "")
    for job in ("synthesize", "prepare", "train"):
        done(re.findall(rf"jobs/{job}\.py .*", commands)[0], tmp_path)
    agreement = []
    for weight in (0, 1):
        where = f"--checkpoint runs/demo --data data --split test --persona-weight {weight} --json {weight}.json"
        done(f"jobs/evaluate.py {where}", tmp_path)
        found = json.loads((tmp_path / f"{weight}.json").read_text())["splits"]["test"]["persona"]
        agreement.append(found["agreement"])
        by_chance = found["agreement_with_shuffled_personas"]
    assert agreement[0] < by_chance + 0.1 < agreement[1]
