"""The learning-rate range test: what is read from a curve, and a real one."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.prepared import write_dataset
from mlflow.tracking import MlflowClient

from arplus.cluster import node
from arplus.config import LrFindConfig, from_dict, preset, tiny, with_values
from arplus.errors import RunError, UsageError
from arplus.study import lr_find

RATES = [1e-6 * 10 ** (i / 20) for i in range(121)]


def loss(rate: float) -> float:
    """Flat to 1e-4, down to 1e-2, then up."""
    x = math.log10(rate)
    return 5.0 if x < -4 else 5.0 - (x + 4) if x < -2 else 3.0 + 4 * (x + 2)


def settings(data: str, storage: Path, **changes: Any) -> LrFindConfig:
    run = tiny(preset("arplus"))
    model = replace(run.model, d_model=32, embedding_size=16, heads=2, ff_size=48, ff_bottleneck=16, dropout=0.0)
    run = replace(run, model=model, data=data, storage=str(storage), run_name="rates", batch_size=8)
    return LrFindConfig(run=replace(run, **changes), steps=60, lr_from=1e-5)


def test_bounds_and_suggestion_lie_where_the_curve_says() -> None:
    found = lr_find.analyse(RATES, [loss(rate) for rate in RATES])
    assert 0.8e-4 < found["low"] < 2.5e-4, "a tenth of the fall is done"
    assert 0.5e-2 < found["high"] < 1.5e-2, "where the loss is lowest"
    assert found["low"] <= found["suggestion"] <= found["high"]


def test_noise_hardly_moves_them() -> None:
    noisy = [loss(rate) + 0.15 * (-1) ** i for i, rate in enumerate(RATES)]
    smooth = lr_find.analyse(RATES, [loss(rate) for rate in RATES])
    assert lr_find.analyse(RATES, noisy)["high"] == pytest.approx(smooth["high"], rel=0.5)


@pytest.mark.parametrize("curve", [[5.0] * 121, [5 + 0.01 * i for i in range(121)]])
def test_a_loss_that_never_falls_is_said(curve: list[float]) -> None:
    with pytest.raises(RunError, match=r"the loss never fell: it was 5.* take more --steps, or another range"):
        lr_find.analyse(RATES, curve)


def test_a_range_must_be_one() -> None:
    with pytest.raises(UsageError, match="--lr-from: must be below lr_to = 1"):
        from_dict(LrFindConfig, {"lr_from": 2.0}, source="test")
    with pytest.raises(UsageError, match=r"--lr-from: is LOW and lr_to is HIGH: .* at least 2\.23e-308"):
        from_dict(LrFindConfig, {"lr_from": 1e-320}, source="test")
    with pytest.raises(UsageError, match=r"--lr-from: .*HIGH / LOW must be below"):
        from_dict(LrFindConfig, {"lr_from": 1e-300, "lr_to": 1e300}, source="test")


def test_what_it_would_start_from_is_looked_at_before_anything_begins(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [[9]], "valid": [[8]]}).uri
    config = with_values(settings(data, tmp_path / "runs"), {"init.character_vectors": "no.txt"}, source="test")
    with pytest.raises(UsageError, match=r"no\.txt: no such file"):
        lr_find.find(config)
    assert not (tmp_path / "runs").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_real_range_test_leaves_curve_plot_and_bounds(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", {"train": [[150]], "valid": [[8]]}).uri
    config = settings(data, tmp_path / "runs", workers=2)
    result = lr_find.find(config)
    folder = tmp_path / "runs" / "rates"
    rates = [point["lr"] for point in result["points"]]
    assert len(rates) > 30, "more than the 19 steps of an epoch"
    assert rates[0] == 1e-5
    assert all(b / a == pytest.approx(1e5 ** (1 / 59)) for a, b in itertools.pairwise(rates))
    assert 1e-5 < result["lr"]["low"] < result["lr"]["high"] < 1
    assert json.loads((folder / lr_find.FILE).read_text())["lr"] == result["lr"]
    assert lr_find.read_bounds(result["file"], "arplus", "test") == (result["lr"]["low"], result["lr"]["high"])
    assert (folder / "lr_range.csv").read_text().count("\n") == 1 + len(rates)
    assert (folder / "lr_range.svg").read_text().rstrip().endswith("</svg>")
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("arplus").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.tags["kind"] == "lr range test"
    assert run.data.tags["code"] == node.versions()["arplus"]
    assert [m.value for m in client.get_metric_history(run.info.run_id, "lr_range/lr")] == rates
    assert {a.path for a in client.list_artifacts(run.info.run_id)} == {"lr_range.csv", "lr_range.json", "lr_range.svg"}
    with pytest.raises(UsageError, match=r"--resume never: .*rates exists"):
        lr_find.find(with_values(config, {"resume": "never"}, source="test"))
