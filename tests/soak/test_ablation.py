"""All rows, two sizes, two seeds, unattended: about 25 minutes on two quiet cores."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from arplus import storage
from arplus.config import PAPER_ROWS, PrepareConfig, SynthesizeConfig
from arplus.config.variants import variants_of
from arplus.prepare.pipeline import prepare
from arplus.synthetic.write import synthesize

pytestmark = [pytest.mark.soak, pytest.mark.timeout(5400)]

ROOT = Path(__file__).parent.parent.parent
RUNS = len(PAPER_ROWS) * 2 * 2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> str:
    folder = tmp_path_factory.mktemp("data")
    raw, output = str(folder / "raw"), str(folder / "data")
    synthesize(SynthesizeConfig(output=raw, records=3_000, persona_answers=0.5, chatterbot=True))
    prepare(PrepareConfig(input=raw, output=output, valid=0.04, test=0.04))
    return output


def start(data: str, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [
        *(sys.executable, "jobs/ablate.py", "--tiny", "--data", data, "--storage", str(folder), "--run-name", "study"),
        *("--seeds", "2", "--lr", "common", "--epochs", "1", "--concurrency", "2", *more),
    ]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    files = storage.list_files(str(folder / "study/trials")) if (folder / "study/trials").exists() else []
    # A writer that is killed leaves a temporary file.
    return {Path(file).stem: storage.read_json(file) for file in files if file.endswith(".json")}


def test_a_killed_study_goes_on_and_no_finished_row_is_repeated(data: str, tmp_path: Path) -> None:
    sizes = ("--sessions", "600,all")
    first = start(data, tmp_path, *sizes)
    while sum(record["outcome"] == "finished" for record in records(tmp_path).values()) < 3:
        assert first.poll() is None
        time.sleep(1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = {name: r["mlflow_run_id"] for name, r in records(tmp_path).items() if r["outcome"] == "finished"}

    again = start(data, tmp_path, *sizes)
    said = again.communicate()[0]
    assert again.returncode == 0, said
    found = records(tmp_path)
    assert len(found) == RUNS
    assert {r["outcome"] for r in found.values()} == {"finished"}
    assert {name: found[name]["mlflow_run_id"] for name in before} == before
    attempts = {
        name: json.loads((tmp_path / f"study/runs/{name}/attempt.json").read_text())["number"] for name in before
    }
    assert set(attempts.values()) == {1}, "a finished row is never repeated"

    kept = {file.parts[-3] for file in (tmp_path / "study/runs").glob("*/checkpoints/*")}
    assert len(kept) == 1, "the best run's"
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "study"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    assert len(runs) == RUNS + 1
    assert {run.info.status for run in runs} == {"FINISHED"}
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {"report.html", "tables.txt", "result.json"} <= {a.path for a in client.list_artifacts(parent.info.run_id)}
    page = (tmp_path / "study/report.html").read_text()
    assert page.count("<svg") == 1
    for label in ("AR+", "-ReZero", "-MemN2N", "the paper"):
        assert f">{label}<" in page
    assert client.get_model_version_by_alias("study", "best").run_id in {run.info.run_id for run in runs}


def test_what_the_paper_found_ineffective_by_one_command(data: str, tmp_path: Path) -> None:
    """And one variant of one's own, each beside its own preset, in the report, the tables and MLflow."""
    own = "undropped=arplus,model.dropout=0"
    study = start(data, tmp_path, "--preset-study", "ineffective", "--variant", own, "--sessions", "600")
    said = study.communicate()[0]
    assert study.returncode == 0, said
    names = {row.name for row in variants_of("ineffective", [own])}
    found = records(tmp_path)
    assert {r["outcome"] for r in found.values()} == {"finished"}
    assert {r["values"].get("variant") for r in found.values()} == names | {None}
    assert len(found) == 2 * (len(names) + len({r["values"]["preset"] for r in found.values()}))
    third = (tmp_path / "study/report.html").read_text().split("<h3>What the paper found ineffective</h3>")[1]
    assert all(f"<td>{name}</td>" in third and name in said for name in names)
    assert third.count(">difference<") == len(names)
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (experiment,) = [e for e in client.search_experiments() if e.name == "study"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    assert {f"response_ppl/{name}" for name in names} <= parent.data.metrics.keys()
    assert "response_ppl_against_arplus_percent/undropped" in parent.data.metrics
