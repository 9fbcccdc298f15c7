"""Every other form of the model on the whole road, with two workers at every stage."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers import faults
from helpers.prepared import write_dataset
from helpers.pretrained import make_pretrained

from arplus.config import EvaluateConfig, ExportConfig, FeaturesConfig, InitConfig, Sampling, TrainConfig
from arplus.evaluation.evaluate import evaluate
from arplus.evaluation.replies import Responder, raw_profile
from arplus.runs import checkpoint
from arplus.runs.export import export
from arplus.training.trainer import train

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200), pytest.mark.usefixtures("ray_cluster")]

PLAIN: dict[str, Any] = {"ff_bottleneck": None, "activation": "gelu", "gate_start": 1.0}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "unshared": ({"shared_stacks": False}, {}),
    "layer-wise": ({"memory_tying": "layer-wise", "memory_hops": 3}, {}),
    "gelu": (PLAIN, {}),
    "adapters": ({"adapter": 4}, {}),
    "bert": (PLAIN | {"heads": 4, "embedding_size": 32}, {"pretrained": "bert"}),
    "electra-decoder": (
        PLAIN | {"heads": 4, "embedding_size": 24, "shared_stacks": False},
        {"pretrained": "electra", "parts": "embeddings,decoder", "layers": "spread"},
    ),
    "replace": ({"features": {"path": "electra", "use": "replace", "layers": "-2,-1", "combine": "weighted"}}, {}),
    "add": ({"features": {"path": "bert", "use": "add", "layers": "-2,0", "combine": "concat"}}, {}),
    "encoder": ({"features": {"path": "bert", "use": "encoder"}}, {}),
}
"""What differs in the model, and what it starts from."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set and pretrained models."""
    folder = tmp_path_factory.mktemp("forms")
    write_dataset(folder / "data", {"train": [[50, 33], [49]], "valid": [[21]], "test": [[20]]})
    make_pretrained(folder / "bert", "Bert")
    make_pretrained(folder / "electra", "Electra")
    return folder


def settings(folder: Path, form: str, **changes: Any) -> TrainConfig:
    model, init = FORMS[form]
    init = {name: f"{folder}/{value}" if name == "pretrained" else value for name, value in init.items()}
    if "features" in model:
        features = model["features"]
        model = {"features": FeaturesConfig(**features | {"path": f"{folder}/{features['path']}"})}
    run = faults.settings(f"{folder}/data", folder / "runs", **changes)
    return replace(run, audit=False, model=replace(run.model, **model), init=InitConfig(**init))


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("form", FORMS)
def test_a_form_trains_goes_on_and_serves(folder: Path, form: str, stage: int, tmp_path: Path) -> None:
    whole = settings(folder, form, zero_stage=stage, run_name=f"{form}-{stage}")
    final = train(whole)
    cut = replace(whole, storage=str(tmp_path), max_steps=14)
    train(cut)
    resumed = train(replace(cut, max_steps=None))
    assert resumed.valid["response_ppl"] == final.valid["response_ppl"], "it goes on to the bit, and starts but once"
    if stage:
        return
    alone = train(replace(whole, workers=1, run_name=f"{form}-alone", model=replace(whole.model, dropout=0.0)))
    together = train(replace(whole, run_name=f"{form}-together", model=replace(whole.model, dropout=0.0)))
    assert alone.valid["response_ppl"] == pytest.approx(together.valid["response_ppl"], rel=1e-3)
    run = f"{whole.storage}/{whole.run_name}"
    metrics = evaluate(EvaluateConfig(checkpoint=run, data=whole.data))["splits"]["test"]
    exported = export(ExportConfig(checkpoint=run, output=str(tmp_path / "exported")))
    assert evaluate(EvaluateConfig(checkpoint=exported, data=whole.data))["splits"]["test"] == metrics
    responder = Responder(checkpoint.load(exported), raw_profile("女", "", ""), Sampling(), seed=0)
    assert responder.reply(["一丁"])
