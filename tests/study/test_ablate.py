"""What an ablation will run: rows, sizes, seeds and rates, and the settings of each run."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from helpers.prepared import write_dataset

from arplus.config import (
    PAPER_ROWS,
    AblateConfig,
    Row,
    TrainConfig,
    VocabularySizes,
    preset,
    tiny,
    to_dict,
    with_values,
)
from arplus.data.dataset import Dataset
from arplus.errors import ResourceError, UsageError
from arplus.model.network import PersonaTransformer
from arplus.study import ablate, execute
from arplus.study.ablate import RunSpec
from arplus.study.record import Study, StudyFacts, StudyFolder, Trial
from arplus.tracking import RunRef


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[100, 60], [40]], "valid": [[10]], "test": [[9]]})


def study(**trials: Trial) -> Study:
    return Study(
        folder=StudyFolder(""),
        facts=StudyFacts(kind="ablation", fingerprint="", mlflow_run_id="", owner="", config={}),
        config=AblateConfig(run=TrainConfig(run_name="s")),
        tracked=RunRef("", "", ""),
        trials=trials,
    )


def done(row: RunSpec, ppl: float) -> Trial:
    results = [{"examples": 1.0, "best_response_ppl": ppl}]
    return Trial(name=row.name, values=row.values, config=TrainConfig(), outcome="finished", results=results)


def test_rows_sizes_and_seeds(dataset: Dataset) -> None:
    config = AblateConfig(run=TrainConfig(seed=5), row=("arplus", "ar"), seeds=2, sessions="all,30")
    sizes = ablate.training_sets(config, dataset)
    whole = dataset.split("train")
    assert [size.examples for size in sizes] == [round(30 * 200 / whole.sessions), 200]
    rows = [row for size in sizes for row in ablate.seed_specs(config, size, study())]
    assert len(rows) == len({row.name for row in rows}) == 8
    assert {row.seed for row in rows} == {5, 6}
    assert {(row.row.name, row.lr) for row in rows} == {("arplus", 2e-3), ("ar", 1.5e-4)}, "the paper's rates"
    common = with_values(config, {"lr": "common", "optimizer.lr": 7e-4}, source="test")
    assert {row.lr for row in ablate.seed_specs(common, sizes[0], study())} == {7e-4}


def test_a_rate_is_tuned_by_the_first_seed(dataset: Dataset) -> None:
    config = AblateConfig(row=("arplus", "ar"), seeds=3, lr="tuned", rates=4)
    size = dataset.split("train")
    tried = ablate.rate_specs(config, size)
    assert [row.lr for row in tried[:4]] == pytest.approx([1.5e-4, 6.08e-4, 2.47e-3, 1e-2], rel=1e-2)
    assert {row.seed for row in tried} == {config.run.seed}
    scores = {row.name: done(row, 30 + abs(row.lr - tried[2].lr)) for row in tried if row.row.name == "arplus"}
    found = ablate.seed_specs(config, size, study(**scores))
    assert [(row.row.name, row.lr, row.seed) for row in found] == [("arplus", tried[2].lr, seed) for seed in range(3)]
    assert found[0] == tried[2], "the first seed's run is not made again"


def test_a_rate_that_failed_is_not_tried_among_the_seeds(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """It might win, with nobody to run the other seeds at it; the next command tries it, and then chooses."""
    config = AblateConfig(row=("arplus",), seeds=2, lr="tuned", rates=3)
    size = dataset.split("train")
    tried = ablate.rate_specs(config, size)
    trials = {row.name: done(row, 30.0 + i) for i, row in enumerate(tried)}
    trials[tried[1].name].outcome = "failed"
    mine = study(**trials)
    rows = ablate.seed_specs(config, size, mine)
    mine.trials[rows[1].name] = replace(done(rows[1], 30.0), outcome="running")
    found: dict[str, list[Trial]] = {}
    monkeypatch.setattr(execute, "execute", lambda *_, again, **__: found.update(again=again))
    ablate.run_missing(config, mine, cast(Any, SimpleNamespace(side_by_side=1)), rows, cast(Any, None))
    assert [trial.name for trial in found["again"]] == [rows[1].name]
    ablate.run_missing(config, mine, cast(Any, SimpleNamespace(side_by_side=1)), tried, cast(Any, None))
    assert [trial.name for trial in found["again"]] == [tried[1].name]


def test_an_evaluation_is_saved_although_mlflow_is_away(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = AblateConfig(run=TrainConfig(data=dataset.uri), row=("arplus",), seeds=1)
    (row,) = rows = ablate.seed_specs(config, dataset.split("train"), study())
    trial = done(row, 30.0)
    trial.config = ablate.settings(config, row)
    mine = replace(study(**{row.name: trial}), folder=StudyFolder(str(tmp_path)))
    mine.folder.facts.write(mine.facts)

    def away(*_: object) -> None:
        raise ResourceError("MLflow cannot be used")

    splits = {"test": {"standard": {"response_ppl": 30.5}}}
    monkeypatch.setattr(ablate, "evaluate", lambda _: {"splits": splits})
    monkeypatch.setattr(ablate, "destination", away)
    ablate.evaluate_missing(config, mine, dataset, rows)
    record = mine.folder.trial(row.name).read()
    assert record == trial
    assert record.evaluation is not None
    assert record.evaluation.splits == splits
    assert (
        f"jobs/evaluate.py --checkpoint {mine.folder.run(row.name).uri} --data {dataset.uri} logs: MLflow"
        in caplog.text
    )


def test_a_variant_is_its_preset_with_other_values(dataset: Dataset) -> None:
    """At every rate and in every size, and whatever it says of the rate is its own."""
    items = ("dropped=no-albert,model.dropout=0.3", "slow=arplus,optimizer.lr=5e-4,batch-size=10")
    config = AblateConfig(run=tiny(preset("arplus")), variant=items, seeds=2, lr="tuned", rates=3)
    config = with_values(config, {}, source="test")
    assert [row.name for row in config.rows] == ["no-albert", "arplus", "dropped", "slow"], "their presets, no other"
    assert config.runs == 3 * (3 + 1) + 2, "the one with a rate of its own is not tuned"
    assert "worker-hours of 14 runs" in ablate.plan(replace(config, run=replace(config.run, data=dataset.uri)))
    assert replace(config, seeds=1).most_at_once == 3 * 3, "as many as there are rates to try"
    size = dataset.split("train")
    tried = ablate.rate_specs(config, size)
    assert {spec.row.name for spec in tried} == {"no-albert", "arplus", "dropped"}
    assert len({spec.name for spec in tried}) == 9
    slow = ablate.seed_specs(config, size, study())
    assert [(spec.row.name, spec.lr, spec.seed) for spec in slow] == [("slow", 5e-4, 0), ("slow", 5e-4, 1)]
    run = ablate.settings(config, slow[1])
    assert (run.preset, run.optimizer.lr, run.batch_size, run.max_steps) == ("arplus", 5e-4, 10, 60)
    run = ablate.settings(config, next(spec for spec in tried if spec.row.name == "dropped"))
    assert run.model == replace(tiny(preset("no-albert")).model, dropout=0.3)


@pytest.mark.parametrize("run", [preset("arplus"), tiny(preset("arplus"))], ids=["full", "tiny"])
def test_the_ineffective_methods_are_networks_of_their_own(run: TrainConfig) -> None:
    study = with_values(AblateConfig(run=run, preset_study="ineffective"), {}, source="test")
    assert [row.name for row in study.rows if not row.is_variant] == ["arplus", "no-factor-ff"]
    parameters = {}
    for row in study.rows:
        with torch.device("meta"):
            network = PersonaTransformer(study.config_of(row).model, VocabularySizes())
        parameters[row.name] = sum(p.numel() for p in network.parameters())
        assert study.config_of(row) != study.preset_of(row) or not row.is_variant
    assert len(parameters) == 9
    other = {name for name, n in parameters.items() if n not in (parameters["arplus"], parameters["no-factor-ff"])}
    assert other >= {"adapters", "unshared-stacks", "weight-predictor"}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ("init.character-vectors=no.txt", "--variant x: .*no.txt: no such file"),
        ("init-from=nowhere", "--variant x: .*nowhere: no complete checkpoint there"),
        ("optimizer.only=hands", "--variant x: --optimizer.only.*hands"),
    ],
)
def test_files_that_a_variant_lacks_are_told_before_anything_runs(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: str, problem: str
) -> None:
    monkeypatch.chdir(tmp_path)
    run = replace(tiny(preset("arplus")), data=dataset.uri, run_name="s")
    with pytest.raises(UsageError, match=problem):
        ablate.ablate(AblateConfig(run=run, variant=(f"x=arplus,{values}",)))
    assert not list(tmp_path.iterdir())


def test_a_variant_may_start_from_a_registered_model(dataset: Dataset, tmp_path: Path) -> None:
    run = replace(tiny(preset("arplus")), data=dataset.uri, storage=str(tmp_path), mlflow="http://127.0.0.1:9")
    with pytest.raises(ResourceError, match=r"^MLflow at http://127.0.0.1:9 cannot be used"):  # it is asked for it
        ablate.ablate(AblateConfig(run=run, variant=("x=arplus,init-from=models:/m/1",)))


def test_a_setting_of_several_values_is_named_once_for_each() -> None:
    item = "frozen=arplus,model.adapter=8,optimizer.only=adapters,optimizer.only=norms and gates"
    (row,) = with_values(AblateConfig(), {"variant": (item,)}, source="test").variants
    assert row.values == {"model.adapter": 8, "optimizer.only": ("adapters", "norms and gates")}


def test_a_run_has_its_rows_network_and_the_studys_settings(dataset: Dataset) -> None:
    config = AblateConfig(run=replace(tiny(preset("arplus")), batch_size=8, epochs=3))
    for name, row in PAPER_ROWS.items():
        found = ablate.settings(config, RunSpec(Row(name, name), 10, 40, 1, 3e-4))
        assert found.model == tiny(row).model
        assert (found.optimizer.lr, found.optimizer.eps) == (3e-4, row.optimizer.eps)
        assert (found.seed, found.batch_size, found.feed.max_examples) == (1, 8, 40)
        assert (found.epochs, found.max_steps) == (3, 15)
    assert ablate.settings(replace(config, examples=60), RunSpec(Row("ar", "ar"), 10, 40, 1, 3e-4)).max_steps == 8


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"sessions": "10k"}, "--sessions: must be different numbers, or all"),
        ({"sessions": "10,10"}, "--sessions: must be different numbers"),
        ({"row": ("arplus", "no-bert")}, "--row: names no preset"),
        ({"row": ("ar", "ar")}, "--row: names a preset twice"),
        ({"variant": ("x",)}, "--variant: x: must be NAME=PRESET,setting=value"),
        ({"variant": ("x/y=ar,model.dropout=0",)}, "--variant: x/y=.*: must be NAME=PRESET,setting=value"),
        ({"variant": ("ar=arplus,model.dropout=0",)}, "--variant: .*: ar is a preset"),
        ({"variant": ("x=plus,model.dropout=0",)}, r"--variant: .*: names no preset .* \(got 'plus'\)"),
        ({"variant": ("x=ar,model.drop=0",)}, r"--variant: .*'model.drop' \(did you mean 'model.dropout'"),
        ({"variant": ("x=ar,model.dropout",)}, "--variant: .*: model.dropout has no value"),
        ({"variant": ("x=ar,seed=1",)}, "--variant: .*: seed is what --seeds sets"),
        ({"variant": ("x=ar,run-name=y",)}, "--variant: .*: unknown key 'run-name'"),
        ({"variant": ("x=ar,model.heads=3",)}, "--variant: x: --model.heads: must divide d_model"),
        ({"variant": ("x=ar,model.dropout=0",) * 2}, "--variant: x is the name of two variants"),
        ({"model": to_dict(preset("ar").model)}, "takes no --model settings"),
        ({"optimizer": {"lr": 1e-3}}, "--optimizer.lr: needs --lr common; with --lr paper"),
        ({"optimizer": {"lr": 1e-3}, "lr": "tuned"}, "--optimizer.lr: needs --lr common; with --lr tuned"),
        ({"optimizer": {"lr": 1e-3, "eps": 1e-8}, "lr": "common"}, "--optimizer.eps: is each row's own"),
    ],
)
def test_wrong_settings_are_named(changes: dict[str, object], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        with_values(AblateConfig(), changes, source="test")


def test_settings_that_hold_for_all_rows_pass() -> None:
    for run in (preset("arplus"), tiny(preset("arplus"))):
        with_values(AblateConfig(run=run), {"optimizer.max_grad_norm": 0.5}, source="test")
        with_values(AblateConfig(run=run), {"optimizer.lr": 1e-3, "lr": "common"}, source="test")


def test_more_sessions_than_there_are(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="the split train has 200 examples, not"):
        ablate.training_sets(AblateConfig(sessions="1000000"), dataset)
    whole = dataset.split("train").sessions
    with pytest.raises(UsageError, match=rf"--sessions {whole},all: two of these are the same set"):
        ablate.training_sets(AblateConfig(sessions=f"{whole},all"), dataset)


def test_the_plan_counts_the_runs(dataset: Dataset, tmp_path: Path) -> None:
    text = ablate.plan(AblateConfig(run=TrainConfig(data=dataset.uri), lr="tuned", sessions="20,all"))
    assert f"{7 * 2 * 6} runs: 7 rows × 2 sizes × 3 seeds and 4 rates for the first" in text
    assert "200 examples, 600 a run" in text
    assert "\nworker-hours of 84 runs: 0.0\n" in text
