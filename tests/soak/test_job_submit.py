"""`ray job submit` as the guide says, with a token, on two nodes, one of which is killed: about 16 minutes."""

import json
import logging
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from helpers import local_cluster
from helpers.local_cluster import BUCKET, ROOT, Cluster, Submission
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from arplus import storage

log = logging.getLogger(__name__)

PLANTED = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "p1anted-mlflow-password"}

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with local_cluster.running(tmp_path_factory.mktemp("cluster") / "state", **PLANTED) as running:
        yield running


@pytest.fixture(scope="module")
def data(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    return local_cluster.prepare(tmp_path_factory.mktemp("prepare"))


def test_the_guides_commands(cluster: Cluster, data: str) -> None:
    """Every line of ``cluster/README.md``, but for the bucket, the server, and a size that suits two CPU nodes."""
    changes = {
        "BUCKET": "arplus/readme",
        "--records 1000000": "--records 1000",
        "train.py arplus": "train.py arplus --tiny --max-steps 20",
        "--workers 4": "--workers 2",
        "--mlflow http://MLFLOW": "--mlflow $MLFLOW_TRACKING_URI",
        "lr_find.py arplus": "lr_find.py arplus --tiny --steps 30",
        "tune.py arplus": "tune.py arplus --tiny --examples 400",
        "--trials 16": "--trials 2",
        "ablate.py": "ablate.py --tiny --row ar --row arplus --examples 400",
        "--seeds 3": "--seeds 1",
        "--entrypoint-num-gpus 1": "",
        "--device gpu": "",
        "--concurrency 4": "",
        "benchmark.py train": "benchmark.py train --rounds 1 --batches 1 --batch-size 8",
    }
    for line in local_cluster.submitted_lines():
        for before, after in changes.items():
            line = line.replace(before, after)
        done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_killed_node_changes_nothing(cluster: Cluster, data: str, tmp_path: Path) -> None:
    """A worker a node; the second node's raylet is killed with -9, and another node takes its place."""
    job = Submission(tmp_path / "log", *local_cluster.train_arguments(data, "node"))
    job.wait_for_steps(20)
    cluster.kill_raylet("node")
    cluster.up()
    seconds = job.wait_for_steps(1)
    log.warning("the first new step came %.0f s after the new node", seconds)
    assert job.end() == 0, job.output
    assert "the workers were started again" in job.output
    local_cluster.assert_ended_right(cluster, job, data, "node")


def test_a_killed_driver_and_the_same_command_again(cluster: Cluster, data: str, tmp_path: Path) -> None:
    arguments = local_cluster.train_arguments(data, "driver")
    first = Submission(tmp_path / "first", *arguments)
    first.wait_for_steps(20)
    first.driver().kill()
    assert first.end() != 0
    second = Submission(tmp_path / "second", *arguments)
    seconds = second.wait_for_steps(1)
    log.warning("the first new step came %.0f s after the second submission", seconds)
    assert second.end() == 0, second.output
    assert "going on with run driver from step" in second.output
    local_cluster.assert_ended_right(cluster, second, data, "driver")


def test_a_stopped_job_saves_and_the_same_command_goes_on(cluster: Cluster, data: str, tmp_path: Path) -> None:
    arguments = [*local_cluster.train_arguments(data, "stopped"), "--checkpoint-every", "1000"]
    first = Submission(tmp_path / "first", *arguments)
    first.wait_for_steps(15)
    subprocess.run(["ray", "job", "stop", first.job_id], check=True, timeout=120)
    first.end()
    assert "the same command goes on from there" in first.output
    assert not storage.exists(f"{BUCKET}/runs/stopped/final_metrics.json")
    assert [run.info.status for run in cluster.runs("stopped")] == ["KILLED"]
    second = Submission(tmp_path / "second", *arguments)
    assert second.end() == 0, second.output
    assert "going on with run stopped from step" in second.output
    local_cluster.assert_ended_right(cluster, second, data, "stopped")
    (run,) = cluster.runs("stopped")
    assert run.data.tags["ray.submission_id"] == second.job_id
    assert run.data.tags["command"].startswith("jobs/train.py arplus ")


def test_a_retried_job_goes_on_on_a_new_cluster(cluster: Cluster, data: str, tmp_path: Path) -> None:
    """As KubeRay's ``backoffLimit`` does it: head and nodes are gone, and the manifest's command runs on others.

    All that stays is the storage, and MLflow.
    """
    (patch,) = yaml.safe_load((ROOT / "cluster/kuberay/train/kustomization.yaml").read_text())["patches"]
    entrypoint = next(c["value"] for c in yaml.safe_load(patch["patch"]) if c["path"] == "/spec/entrypoint")
    for before, after in {
        "python /app/": "",
        "s3://example-bucket/personaldialog": data,
        "s3://example-bucket/runs": f"{BUCKET}/runs",
        "--workers 4 --device gpu": "--tiny --workers 2 --cpus-per-worker 2",
        "--batch-size 1024": "--batch-size 32 --epochs 2 --checkpoint-every 15 --log-every 2 --audit",
    }.items():
        assert before in entrypoint
        entrypoint = entrypoint.replace(before, after)
    first = Submission(tmp_path / "first", *entrypoint.split())
    first.wait_for_steps(20)
    cluster.kill("head")
    cluster.kill("node")
    assert first.end() != 0
    cluster.up()
    second = Submission(tmp_path / "second", *entrypoint.split())
    assert second.end() == 0, second.output
    assert "going on with run arplus-1 from step" in second.output
    local_cluster.assert_ended_right(cluster, second, data, "arplus-1")


def test_a_fresh_clone_submits_where_only_ray_is_installed(cluster: Cluster, data: str, tmp_path: Path) -> None:
    """``pip install 'ray[default]'`` and `git clone`: none of our own packages, and nothing that `make setup` makes."""
    site, clone = tmp_path / "site", tmp_path / "clone"
    site.mkdir()
    installed = [distribution(name) for name in with_dependencies("ray", ("default",))]
    tops = {file.parts[0]: found for found in installed for file in found.files or () if ".." not in file.parts}
    for top, found in tops.items():
        (site / top).symlink_to(str(found.locate_file(top)))
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    program = f"import sys; sys.path.append({str(site)!r}); from ray.scripts.scripts import main; main()"
    words = ["job", "submit", "--working-dir", ".", "--", "python", "jobs/train.py", "arplus", "--dry-run"]
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program, *words, "--data", data],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "live parameters" in done.stdout
    assert not (site / "torch").exists()


def with_dependencies(name: str, extras: tuple[str, ...] = (), found: set[str] | None = None) -> set[str]:
    """An installed distribution, and all that it needs."""
    found = set() if found is None else found
    found.add(name)
    for line in distribution(name).requires or ():
        need = Requirement(line)
        wanted = need.marker is None or any(need.marker.evaluate({"extra": extra}) for extra in ("", *extras))
        if wanted and canonicalize_name(need.name) not in found:
            with_dependencies(canonicalize_name(need.name), tuple(need.extras), found)
    return found


def test_no_secret_is_found_anywhere(cluster: Cluster, data: str) -> None:
    """In what all the jobs of this module have left: Ray's job list and logs, MLflow's database, the bucket."""
    token = (cluster.state / "token").read_text()
    header = {"Authorization": f"Bearer {token}"}
    request = urllib.request.Request(f"{os.environ['RAY_API_SERVER_ADDRESS']}/api/jobs/", headers=header)
    with urllib.request.urlopen(request, timeout=30) as answer:
        jobs = answer.read()
    assert "runtime_env" in json.loads(jobs)[0]
    found = {"the job list": jobs}
    found |= {uri: storage.read_bytes(uri) for uri in storage.list_files(BUCKET)}
    for folder in (cluster.state, Path((cluster.state / "ray").read_text().strip())):
        found |= {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    for home in ("env", "token", "s3.json"):
        assert (cluster.state / home).stat().st_mode & 0o077 == 0
        del found[str(cluster.state / home)]
    secrets = [token, os.environ["AWS_SECRET_ACCESS_KEY"], PLANTED["MLFLOW_TRACKING_PASSWORD"]]
    assert {where for where, content in found.items() for secret in secrets if secret.encode() in content} == set()
    assert len([where for where, content in found.items() if b"--run-name" in content]) > 3, "the search finds logs"
