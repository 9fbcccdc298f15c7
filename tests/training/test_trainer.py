"""Whole training runs on a real Ray with real DeepSpeed, MLflow and storage."""

import gzip
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import faults
from helpers.faults import EXAMPLES, STEPS, VALID
from helpers.prepared import write_dataset
from mlflow.tracking import MlflowClient

from arplus import tracking
from arplus.cluster import node, preflight
from arplus.config import EvaluateConfig, TrainConfig, flat
from arplus.data.dataset import Dataset
from arplus.errors import NonFiniteLossError, ResourceError, UsageError
from arplus.evaluation.delivery import destination
from arplus.evaluation.evaluate import evaluate
from arplus.model.cost import component_of
from arplus.runs import checkpoint
from arplus.runs.folder import RunFolder
from arplus.runs.resume import ResumePoint
from arplus.training.context import StudyContext
from arplus.training.start import load, resolve
from arplus.training.trainer import begin_tracking, train

pytestmark = pytest.mark.usefixtures("ray_cluster")


def settings(data: str, storage: Path, **changes: Any) -> TrainConfig:
    """One worker, by default."""
    return replace(faults.settings(data, storage), **{"workers": 1, "audit": False, **changes})


def test_a_run_leaves_metrics_checkpoints_and_its_configuration(finished: tuple) -> None:
    config, final = finished
    folder = Path(config.storage) / "two"
    assert json.loads((folder / "final_metrics.json").read_text()) == final.flat()
    assert final.steps == STEPS
    assert final.stopped_early is False
    assert final.examples == 2 * EXAMPLES
    assert final.valid["examples"] == VALID
    assert final.valid["response_ppl"] == pytest.approx(math.exp(final.valid["dialogue_loss"]))
    newest = checkpoint.load(checkpoint.list_complete(str(folder))[-1], moments=True)
    assert newest.config.data == config.data
    assert newest.progress.step == final.steps
    assert len(newest.moments) == 2 * len(newest.weights)
    best = checkpoint.load(str(folder))
    assert best.progress.best_response_ppl == final.best_response_ppl


def test_mlflow_has_the_run(finished: tuple) -> None:
    config, final = finished
    client = MlflowClient(tracking.default_uri(config.storage))
    run = client.get_run(final.mlflow_run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["optimizer.lr"] == "0.002"
    assert run.data.tags["fingerprint"] == "test"
    assert run.data.tags["code"] == node.versions()["arplus"]
    assert run.data.tags["mine"] == "a=b", "of --tag"
    assert len(run.data.tags["mlflow.source.git.commit"]) == 40
    assert run.data.tags.keys() >= {"command", "ray.job_id", "mlflow.user", "mlflow.source.name"}
    assert (
        f"**Response perplexity on validation: {final.best_response_ppl:.3f}**" in run.data.tags["mlflow.note.content"]
    )
    assert set(run.data.params) < set(flat(config)), "what is as the preset has it is in config.json alone"
    assert len(run.data.params) < 25
    experiment = client.get_experiment(run.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    version = client.search_model_versions("name = 'a model'")[0]
    assert (version.version, version.run_id) == (1, run.info.run_id)
    with tracking.fetched("models:/a model/1", client.tracking_uri) as copy:
        assert checkpoint.load(copy).progress.best_response_ppl == final.best_response_ppl
    steps = [m.step for m in client.get_metric_history(run.info.run_id, "train/loss")]
    assert steps[-1] == 2 * EXAMPLES
    assert steps == sorted(steps)
    assert run.data.metrics["valid/response_ppl"] == pytest.approx(final.valid["response_ppl"])
    assert {"perf/examples_per_second", "perf/data_wait_share", "train/grad_norm"} <= run.data.metrics.keys()
    assert 0 < run.data.metrics["perf/median_rank_seconds"] <= run.data.metrics["perf/slowest_rank_seconds"]
    assert "perf/mfu" not in run.data.metrics, "the peak of this CPU is not known"
    assert 0 < run.data.metrics["system/system_memory_usage_percentage"] < 100
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"config.json", "checkpoint", "sample_replies.txt", "final_metrics.json"} <= artifacts
    profiles = {a.path for a in client.list_artifacts(run.info.run_id, "profile")}
    assert profiles == {"profile/steps-3-4.trace.json.gz", "profile/steps-3-4.txt"}


def test_the_steps_that_were_asked_for_are_profiled(finished: tuple) -> None:
    folder = Path(finished[0].storage) / "two" / "profile"
    with gzip.open(folder / "steps-3-4.trace.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert names.count("Optimizer.step#AdamW.step") == 2
    assert any("gloo:all_reduce" in name for name in names)
    assert "aten::addmm" in (folder / "steps-3-4.txt").read_text()


def test_a_stopped_run_goes_on_in_mid_epoch_as_if_nothing_had_happened(
    data: str, finished: tuple, tmp_path: Path
) -> None:
    config, final = finished
    first = replace(config, storage=str(tmp_path), max_steps=14)
    assert train(first).steps == 14
    resumed = train(replace(first, max_steps=None))
    assert resumed.mlflow_run_id != final.mlflow_run_id
    for name in ("steps", "examples", "valid/response_ppl", "best_response_ppl"):
        assert resumed.flat()[name] == final.flat()[name], "the same number of workers resumes to the bit"


def test_a_second_stage_trains_adapters_alone(finished: tuple, data: str, tmp_path: Path) -> None:
    first, _ = finished
    config = faults.second_stage(settings(data, tmp_path, run_name="second", epochs=1, zero_stage=3), first)
    train(config)
    before = checkpoint.load(str(faults.folder(first))).weights
    after = checkpoint.load(str(tmp_path / "second"), moments=True)
    moved = {name for name, value in after.weights.items() if name not in before or not value.equal(before[name])}
    assert {component_of(name) for name in moved} == set(config.optimizer.only)
    assert {name.split(".", 1)[1] for name in after.moments} == moved
    assert after.schedule == {"lr": 0.0, "step": STEPS // 2}
    client = MlflowClient(tracking.default_uri(config.storage))
    (run,) = client.search_runs([client.get_experiment_by_name("arplus").experiment_id])
    rates = [m.value for m in client.get_metric_history(run.info.run_id, "train/lr")]
    assert rates == pytest.approx([2e-3 * min(i / 4, (17 - i) / 13) for i in range(17)])


def test_a_best_that_a_kill_left_unmarked_is_marked_at_the_next_start(finished: tuple, tmp_path: Path) -> None:
    config = replace(finished[0], storage=str(tmp_path))
    shutil.copytree(Path(finished[0].storage) / "two", tmp_path / "two")
    best = tmp_path / "two" / "best.json"
    marked = best.read_text()
    best.write_text(json.dumps({"checkpoint": "checkpoints/gone", "response_ppl": 1e9}))
    train(config)
    assert best.read_text() == marked


def test_a_run_is_not_resumed_on_other_data(finished: tuple, tmp_path: Path) -> None:
    config, _ = finished
    other = write_dataset(tmp_path, {"train": [[40]], "valid": [[5]]}, fingerprint="another")
    with pytest.raises(UsageError, match=r"fingerprint test, and .* has another; take another --run-name"):
        train(replace(config, data=other.uri))


def test_a_non_finite_loss_stops_the_run_and_names_what_happened(data: str, tmp_path: Path) -> None:
    config = settings(data, tmp_path, run_name="diverges")
    config = replace(config, optimizer=replace(config.optimizer, lr=1e30, max_grad_norm=1e30))
    with pytest.raises(NonFiniteLossError, match=r"step \d+ of epoch 1: .*Example ids: \[\d.*Last good checkpoint"):
        train(config)
    client = MlflowClient(tracking.default_uri(config.storage))
    (run,) = client.search_runs([client.get_experiment_by_name("arplus").experiment_id])
    assert run.info.status == "FAILED"


def test_more_workers_than_can_be_fed_are_refused_with_the_sum(data: str, tmp_path: Path) -> None:
    with pytest.raises(ResourceError, match=r"8 workers × 0.2 CPUs \+ 1 CPU for the data feed = 2.6 CPUs.*at most 5"):
        train(settings(data, tmp_path, workers=8))


def test_a_weight_predictor_needs_labels(data: str, tmp_path: Path) -> None:
    """Before anything starts."""
    old = Path(shutil.copytree(data, tmp_path / "old")) / "manifest.json"
    old.write_text(json.dumps({k: v for k, v in json.loads(old.read_text()).items() if k != "persona_related"}))
    config = settings(str(old.parent), tmp_path)
    with pytest.raises(UsageError, match=r"--data .*old: has no labels for --model.persona-weight predicted"):
        train(replace(config, model=replace(config.model, persona_weight="predicted")))


def test_a_worker_on_a_node_of_other_versions_ends_the_run(
    data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine that joined after the preflight; here it is this process that has another torch."""
    here = node.versions() | {"torch": "1.0"}
    monkeypatch.setattr(preflight, "check_nodes", lambda *_: None)
    monkeypatch.setattr(node, "versions", lambda: here)
    with pytest.raises(ResourceError, match=r"other versions \(torch \S+ there, 1.0 here\); start all nodes from one"):
        train(settings(data, tmp_path, run_name="other"))


def test_only_a_new_run_needs_mlflow_at_its_start(data: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config, dataset = settings(data, tmp_path, mlflow="http://127.0.0.1:9"), Dataset.open(data)
    with pytest.raises(ResourceError, match=r"http://127\.0\.0\.1:9"):
        begin_tracking(config, dataset, ResumePoint(None, None), None)
    assert begin_tracking(config, dataset, ResumePoint(None, "abc"), None).run_id == "abc"
    assert caplog.messages[-1].startswith("going on without MLflow until it answers: ")


def test_a_studys_run_waits_for_mlflow(data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs that do not would end the study."""
    config, dataset = settings(data, tmp_path, mlflow="http://127.0.0.1:9"), Dataset.open(data)
    answers: list[Any] = [ResourceError("away"), ResourceError("away"), tracking.RunRef("", "", "new")]

    def start_run(*_: Any, **__: Any) -> tracking.RunRef:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(tracking, "start_run", start_run)
    part = StudyContext(parent_run_id="study", tags={})
    assert begin_tracking(config, dataset, ResumePoint(None, None), part).run_id == "new"
    answers.append(ResourceError("away"))
    assert begin_tracking(config, dataset, ResumePoint(None, "abc"), part).run_id == "abc", (
        "one that goes on need not wait"
    )


def test_ray_finds_nothing_to_unpickle_in_a_runs_folder(finished: tuple) -> None:
    """Each job has a folder of its own there, and what Ray Train reads again at a restart is JSON."""
    config, _ = finished
    left = [p for p in (Path(config.storage) / "two" / "ray").rglob("*") if p.is_file()]
    assert {p.suffix for p in left if p.stat().st_size} <= {".json"}


def test_a_run_starts_from_a_registered_model(finished: tuple, data: str, tmp_path: Path) -> None:
    uri = tracking.default_uri(finished[0].storage)
    config = resolve(settings(data, tmp_path, init_from="models:/a model/latest", mlflow=uri))
    assert config.init_from == "models:/a model/1", "of today's, whenever the run goes on"
    RunFolder(f"{config.storage}/{config.run_name}").config.write(replace(config, init_from="models:/a model/0"))
    assert resolve(settings(data, tmp_path, init_from="models:/a model/latest")).init_from == "models:/a model/0"
    best = checkpoint.load(str(Path(finished[0].storage) / "two")).weights
    assert all(torch.equal(best[name], value) for name, value in load(config, None)[1].weights().items())
    asked = EvaluateConfig(checkpoint="models:/a model/latest", data=data, split=("valid",), mlflow=uri)
    to = destination(asked)
    assert (to.run_id, to.mlflow, to.records) == (finished[1].mlflow_run_id, uri, None)
    found = evaluate(asked)
    assert found["checkpoint"] == "models:/a model/1"
    ppl = found["splits"]["valid"]["standard"]["response_ppl"]
    assert ppl == pytest.approx(finished[1].best_response_ppl, rel=1e-4)


def test_weights_of_another_vocabulary_are_refused(finished: tuple, data: str, tmp_path: Path) -> None:
    state = checkpoint.load(str(Path(finished[0].storage) / "two"))
    tokens = type(state.characters)(state.characters.tokens[::-1])  # as many, which says nothing
    wrong = checkpoint.save(str(tmp_path / "other"), replace(state, characters=tokens))
    with pytest.raises(UsageError, match=r"--data .* characters are not the .* of --init-from"):
        train(settings(data, tmp_path, init_from=wrong))
