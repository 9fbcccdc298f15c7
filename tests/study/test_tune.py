"""A real small sweep: Ray Tune over Ray Train, ASHA, MLflow, and the files that it leaves."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.prepared import write_dataset
from mlflow.tracking import MlflowClient

from arplus import cli, tracking
from arplus.cluster import node
from arplus.config import EstimateConfig, PlacementConfig, TuneConfig, preset, tiny, to_dict, with_values
from arplus.data.dataset import Dataset
from arplus.errors import ResourceError, UsageError
from arplus.runs import checkpoint
from arplus.runs.attempt import SupersededError
from arplus.study import execute, tune
from arplus.study.record import Study, resolve_study

pytestmark = [pytest.mark.timeout(600), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[150]], "valid": [[20]]}).uri


def settings(data: str, storage: Path, **changes: Any) -> TuneConfig:
    """A grid of two points, the second of which learns nothing."""
    run = tiny(preset("arplus"))
    model = replace(run.model, d_model=32, embedding_size=16, heads=2, ff_size=48, ff_bottleneck=16)
    run = replace(run, model=model, data=data, storage=str(storage), run_name="sweep", batch_size=8)
    config = TuneConfig(
        run=run,
        trials=2,
        search="grid",
        space=("optimizer.lr=choice(0.01,0.000001)", "objective.lambda1=fixed"),
        examples=222,
        validations=4,
    )
    return replace(config, **changes)


@pytest.fixture(scope="module")
def finished(data: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[TuneConfig, dict[str, Any]]:
    config = settings(data, tmp_path_factory.mktemp("storage"))
    drop = Study.drop_checkpoints

    def look_first(study: Study) -> None:
        BYTES.update({name: stored(Path(study.uri, "runs", name, "checkpoints")) for name in study.trials})
        drop(study)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "drop_checkpoints", look_first)
        return config, tune.sweep(config)


BYTES: dict[str, int] = {}
"""What the trials' checkpoints took just before the sweep's end."""


def stored(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def folder(config: TuneConfig) -> Path:
    return Path(config.run.storage) / config.run.run_name


def test_the_better_trial_wins_and_the_other_is_stopped_early(finished: tuple) -> None:
    _, result = finished
    assert result["best"] == "trial-0001"
    assert result["values"] == {"optimizer.lr": 0.01}
    good, bad = result["trials"]
    assert (good["outcome"], bad["outcome"]) == ("finished", "stopped")
    assert good["final"]["examples"] == 222
    assert good["results"][-1]["examples"] == 222
    assert [r["examples"] for r in bad["results"]] == [56], "the first of four validations: 7 of 28 steps"
    assert (
        result["response_ppl"] == good["final"]["best_response_ppl"] == min(r["response_ppl"] for r in good["results"])
    )


def test_the_best_trial_alone_keeps_its_checkpoints(finished: tuple) -> None:
    config, _ = finished
    good, bad = (folder(config) / "runs" / name for name in ("trial-0001", "trial-0002"))
    whole = stored(checkpoint_of(good))
    assert stored(good / "checkpoints") == BYTES["trial-0001"] >= 2 * whole - 64, "two, whose digits differ"
    assert 0 < BYTES["trial-0002"] < 0.45 * whole, "the best one, without optimizer state"
    assert stored(bad / "checkpoints") == 0
    assert {"config.json", "attempt.json", "tracking.jsonl"} <= {file.name for file in bad.iterdir()}
    assert checkpoint.load(str(good), moments=True).moments


def checkpoint_of(run: Path) -> Path:
    return Path(checkpoint.find(str(run)))


def test_resources_are_given_back_after_a_trial_was_stopped(finished: tuple) -> None:
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    assert ray.available_resources()["CPU"] == 2
    states = [group["state"] for group in ray.util.placement_group_table().values()]
    assert set(states) <= {"REMOVED"}


def test_the_best_settings_are_a_file_that_train_takes(finished: tuple) -> None:
    config, result = finished
    run = cli.train_command(["--config", result["config"]], prog="jobs/train.py").config
    assert run.optimizer.lr == 0.01
    assert (run.epochs, run.max_steps, run.validate_every) == (config.run.epochs, None, None), (
        "a whole run, not a trial"
    )
    assert (run.storage, run.run_name, run.data) == (config.run.storage, "sweep-best", config.run.data)
    assert run.model == config.run.model


def test_mlflow_has_the_sweep_as_a_parent_of_its_trials(finished: tuple) -> None:
    config, result = finished
    client = MlflowClient(tracking.default_uri(config.run.storage))
    experiment = client.get_experiment_by_name("sweep")
    runs = {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}
    assert sorted(runs) == ["sweep", "trial-0001", "trial-0002"]
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert {run.data.tags["code"] for run in runs.values()} == {node.versions()["arplus"]}
    parent = runs.pop("sweep")
    assert all(run.data.tags["mlflow.parentRunId"] == parent.info.run_id for run in runs.values())
    assert all(run.data.tags["attempts"] == "1" for run in runs.values())
    assert runs["trial-0002"].data.tags["outcome"].startswith("stopped early after 56 examples")
    assert runs["trial-0001"].inputs.dataset_inputs[0].dataset.digest == "test"
    assert parent.inputs.dataset_inputs[0].dataset.digest == "test"
    assert parent.data.metrics["best/response_ppl"] == pytest.approx(result["response_ppl"])
    assert parent.data.tags["best"] == "trial-0001"
    assert parent.data.tags["best.optimizer.lr"] == "0.01"
    judged = result["verdict"]
    assert (judged["winner"], judged["runner_up"], judged["noise"]) == ("trial-0001", "trial-0002", False)
    assert judged["low"] <= judged["difference"] <= judged["high"] < 0
    said = parent.data.tags["mlflow.note.content"]
    assert said.startswith(
        f"**trial-0001 won with a response perplexity of {result['response_ppl']:.3f}** (optimizer.lr"
    )
    (below,) = re.findall(r", (\S+) % below trial-0002, which was stopped early: trial-0001 and trial-0002 d", said)
    other = runs["trial-0002"].data.metrics["result/response_ppl"]
    assert float(below) == pytest.approx(100 * (1 - result["response_ppl"] / other), abs=0.01)
    assert "differ by more than noise" in said
    assert "place 2 of 2" in runs["trial-0002"].data.tags["result"]
    assert "trial-0001 and trial-0002 differ by" in runs["trial-0002"].data.tags["result"], "whom from, on both pages"
    assert runs["trial-0001"].data.metrics["result/percent_above_best"] == 0
    assert runs["trial-0002"].data.params["optimizer.lr"] == "1e-06"
    assert runs["trial-0002"].data.tags["command"] == parent.data.tags["command"]
    artifacts = {a.path for a in client.list_artifacts(parent.info.run_id)}
    assert {"best_config.json", "trials.csv", "result.json", "study.json"} <= artifacts
    version = client.get_model_version_by_alias("sweep", "best")
    assert version.run_id == runs["trial-0001"].info.run_id
    assert {a.path for a in client.list_artifacts(version.run_id, "checkpoint")} >= {"checkpoint/weights.safetensors"}
    assert result["runs_url"].endswith(f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning")
    assert all(run.info.run_id in result["compare_url"] for run in runs.values())


def test_without_mlflow_the_tables_are_written_and_the_lack_is_said(
    finished: tuple, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config, result = finished
    study = Study.begin(resolve_study(config, "tune"), kind="sweep", fingerprint="test")
    before = {name: (folder(config) / name).read_text() for name in ("result.json", "trials.csv", "best_config.json")}
    for name in ("trials.csv", "best_config.json"):  # result.json alone has the verdict: the runner-up is gone
        (folder(config) / name).unlink()
    study.tracked = study.tracked._replace(uri="http://127.0.0.1:9")
    tracker = tracking.Tracker(study.tracked, record=tmp_path / "r.jsonl")
    dataset = Dataset.open(config.run.data)
    found = tune.finish(study.config, tune.space(study.config), study, tracker, dataset)  # type: ignore[arg-type]
    tracker.close(timeout=0.1)
    assert found["model"] is None
    assert found["trials"] == result["trials"]
    assert json.loads((folder(config) / "result.json").read_text()) == found
    assert (folder(config) / "trials.csv").read_text() == before["trials.csv"]
    # Its files may have arrived: MLflow's client keeps in mind where a run's artifacts go, here to the same disk.
    assert re.search("is not registered in MLflow: .*; the same command again registers it", caplog.text)


def test_the_same_command_again_repeats_nothing(finished: tuple) -> None:
    config, result = finished
    attempts = [(folder(config) / "runs" / t["name"] / "attempt.json").read_text() for t in result["trials"]]
    again = tune.sweep(config)
    assert again == result
    client = MlflowClient(tracking.default_uri(config.run.storage))
    assert len(client.search_model_versions("name = 'sweep'")) == 1
    assert [(folder(config) / "runs" / t["name"] / "attempt.json").read_text() for t in again["trials"]] == attempts


def test_a_sweep_of_other_settings_or_a_taken_name_is_refused(finished: tuple, data: str, tmp_path: Path) -> None:
    config, _ = finished
    with pytest.raises(UsageError, match=r"other settings \(examples: 222 there, 223 here\); take another --run-name"):
        tune.sweep(replace(config, examples=223))
    with pytest.raises(UsageError, match=r"--resume never: .*study.json exists"):
        tune.sweep(with_values(config, {"resume": "never"}, source="test"))
    other = write_dataset(tmp_path / "data", {"train": [[40]], "valid": [[5]]}, fingerprint="another")
    with pytest.raises(UsageError, match=r"on data of fingerprint test, and .* has another"):
        tune.sweep(with_values(config, {"data": other.uri}, source="test"))
    with pytest.raises(UsageError, match=r"--run-name trial-0001: .* is a training run"):
        tune.sweep(
            with_values(config, {"storage": str(folder(config) / "runs"), "run_name": "trial-0001"}, source="test")
        )


def test_wrong_ends_and_a_cluster_that_is_too_small_are_refused_first(data: str, tmp_path: Path) -> None:
    config = settings(data, tmp_path, search="random")
    with pytest.raises(UsageError, match=r"^--space model.dropout=uniform\(0,1\): at model.dropout 1: .* less than 1"):
        tune.sweep(replace(config, space=("model.dropout=uniform(0,1)",)))
    with pytest.raises(UsageError, match=r"^--space model.heads=choice\(2,3\): at model.heads 3: .* must divide"):
        tune.sweep(replace(config, space=("model.heads=choice(2,3)",)))
    with pytest.raises(UsageError, match=r"^--space: at .* 0, model.heads 4, model.d_model 34: --model.heads: must"):
        tune.sweep(replace(config, space=("model.heads=choice(2,4)", "model.d_model=choice(32,34)")))
    with pytest.raises(UsageError, match=r"no\.txt: no such file"):
        tune.sweep(with_values(config, {"init.character_vectors": "no.txt"}, source="test"))
    with pytest.raises(UsageError, match=r"lambda0=choice\(0,1\): at objective.lambda0 0: trials cannot be compared"):
        tune.sweep(replace(config, space=("objective.lambda0=choice(0,1)",)))
    with pytest.raises(ResourceError, match="9 workers"):
        tune.sweep(with_values(config, {"workers": 9, "batch_size": 9}, source="test"))
    assert not list(tmp_path.iterdir()), "nothing was begun"


def test_bounds_of_a_range_test_are_taken_if_they_are_of_this_model(data: str, tmp_path: Path) -> None:
    file = tmp_path / "lr_range.json"
    file.write_text(json.dumps({"preset": "arplus", "fingerprint": "test", "lr": {"low": 1e-4, "high": 3e-2}}))
    config = settings(data, tmp_path, lr_bounds=str(file), search="random", space=())
    assert [d.text for d in tune.space(config)] == [
        "optimizer.lr=loguniform(0.0001,0.03)",
        "objective.lambda1=uniform(0,1)",
    ]
    with pytest.raises(UsageError, match=r"^--lr-bounds .*: is of preset 'arplus', not 'ar'"):
        tune.space(with_values(config, {"preset": "ar"}, source="test"))
    file.write_text("{}")
    with pytest.raises(UsageError, match=r"^--lr-bounds .*: is not the lr_range.json of a range test"):
        tune.space(config)


def test_a_plan_says_what_would_be_tried(data: str, tmp_path: Path) -> None:
    config = settings(data, tmp_path)
    plan = tune.plan(config)
    assert "optimizer.lr=choice(0.01,1e-06)" in plan
    assert "examples per trial: 222 of 150 per epoch (28 steps)" in plan
    assert json.loads(plan.split("\n\n")[0]) == json.loads(json.dumps(to_dict(config)))


def test_a_plan_says_the_hours_of_all_trials(data: str, tmp_path: Path) -> None:
    """Two trials of 222 examples, at 0.01 examples a second: 12.3 hours of a worker."""
    config = settings(data, tmp_path, concurrency=2)
    estimate = EstimateConfig(examples_per_second=0.01, price=2.0)
    plan = tune.plan(replace(config, run=replace(config.run, estimate=estimate)))
    assert "worker-hours of 2 runs: 12.3, cost: 24.67 at 2 each\nhours with 2 runs side by side: 6.2\n" in plan
    assert "0.01 examples/s per worker, as given, no run that ends early; no loss" in plan
    assert "GPU" not in plan.partition("what trials differ in")[2]
    assert "of the largest run (arplus):\nmemory per worker at a step's fullest moment, GiB:" in plan
    shared = replace(config.run, estimate=estimate, placement=PlacementConfig(gpus_per_worker=0.5))
    plan = tune.plan(replace(config, run=shared))
    assert "hours with 2 runs side by side: 6.2 to 12.3\nGPU-hours with 2 runs per GPU: 6.2 to 12.3, as they" in plan
    assert "memory of a GPU that 2 runs share (--gpus-per-worker 0.5): " in plan


def test_a_study_that_another_job_took_over_is_left_alone(finished: tuple) -> None:
    """Two jobs of one name, as a scheduler's retry makes them while the first one still runs."""
    config, result = finished
    first = Study.begin(resolve_study(config, "tune"), kind="sweep", fingerprint="test")
    second = Study.begin(resolve_study(config, "tune"), kind="sweep", fingerprint="test")
    trial = first.trials["trial-0001"]
    second.save(second.trials["trial-0001"])
    trial.outcome = "failed"
    client = MlflowClient(tracking.default_uri(config.run.storage))
    with pytest.raises(SupersededError, match="another job has taken this study over"), execute.study_session(first):
        first.save(trial)
    assert json.loads((folder(config) / "trials" / "trial-0001.json").read_text())["outcome"] == "finished"
    assert client.get_run(first.tracked.run_id).info.status == "RUNNING", "it is the other job's"
    with pytest.raises(SystemExit), execute.study_session(second):
        raise SystemExit(15)  # Ray's, where `ray job stop` ends a driver
    assert client.get_run(first.tracked.run_id).info.status == "KILLED"
    assert second.best is not None
    assert second.best.name == result["best"]
