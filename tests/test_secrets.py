"""Secrets stay where they are: in the environment. A settings file, a log, a tag would show them to everyone."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arplus import cli, storage
from arplus.config import ChatConfig, EvaluateConfig, ExportConfig, PrepareConfig, SynthesizeConfig, preset
from arplus.errors import NO_CREDENTIALS, UsageError, mask, redact

ROOT = Path(__file__).parent.parent
SECRET = "hunter2"

JOBS = """
import runpy, sys
sys.path.insert(0, "tests")
from helpers import forks
forks.use()
codes = []
for command in sys.argv[1:]:
    sys.argv = command.split()
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        codes.append(end.code)
    if sys.argv[0] == "jobs/prepare.py":
        from arplus import storage
        manifest = storage.read_json(sys.argv[-1] + "/manifest.json")
        manifest["splits"]["valid"]["examples"] += 1
        storage.write_json(sys.argv[-1] + "/manifest.json", manifest)
print("exit codes", codes)
"""
"""Runs jobs one after another on one cluster; what prepare wrote gets a mistake that is found at a validation."""


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    ("default", "flag", "value"),
    [
        (preset("arplus"), "--mlflow", f"http://me:{SECRET}@mlflow.example.org"),
        (preset("arplus"), "--data", f"s3://KEY:{SECRET}@bucket/data"),
        (preset("arplus"), "--storage", f"s3://KEY:{SECRET}@bucket/runs"),
        (preset("arplus"), "--init-from", f"s3://KEY:{SECRET}@bucket/runs/first"),
        (SynthesizeConfig(), "--output", f"s3://KEY:{SECRET}@bucket/raw"),
        (PrepareConfig(), "--input", f"s3://KEY:{SECRET}@bucket/raw"),
        (PrepareConfig(), "--evaluation-set", f"random=s3://KEY:{SECRET}@bucket/test"),
        (EvaluateConfig(), "--checkpoint", f"s3://{SECRET}@bucket/runs"),
        (ExportConfig(), "--output", f"s3://KEY:{SECRET}@bucket/exported"),
        (ChatConfig(), "--checkpoint", f"s3://KEY:{SECRET}@bucket/runs"),
    ],
)
def test_an_address_with_credentials_is_refused(default: Any, flag: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{flag}: must not hold a user or password.*AWS_SECRET_ACCESS_KEY") as caught:
        cli.parse(default, [flag, value], prog="job", description="")
    assert SECRET not in str(caught.value)


def test_what_only_looks_like_one_is_not() -> None:
    cli.parse(preset("arplus"), ["--data", "s3://bucket/a@b", "--storage", "runs/me@home"], prog="job", description="")
    cli.parse(ChatConfig(), ["--checkpoint", "runs/x", "--say", "写信给 me@example.org"], prog="job", description="")


PASSWORDS = st.text(
    st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="\\"), min_size=3, max_size=20
)


@given(PASSWORDS, st.sampled_from(["http", "https", "postgresql", "mysql+pymysql"]))
def test_no_part_of_a_password_is_told(password: str, scheme: str) -> None:
    """Whatever characters it holds: the address's own among them."""
    with pytest.raises(UsageError) as caught:
        cli.parse(preset("arplus"), ["--mlflow", f"{scheme}://0:{password}@0"], prog="job", description="")
    assert str(caught.value) == f"--mlflow: {NO_CREDENTIALS}"


@pytest.mark.parametrize("uri", [f"s3://KEY:{SECRET}@bucket/x", f"https://me:{SECRET}@example.org/x"])
def test_storage_names_no_credentials(uri: str) -> None:
    with pytest.raises(UsageError, match=r"://\*\*\*@") as caught:
        storage.read_bytes(uri)
    assert SECRET not in str(caught.value)


def test_what_is_shown_of_an_address() -> None:
    assert redact(f"a sqlite:///x and http://me:{SECRET}@host/p@q") == "a sqlite:///x and http://***@q"


@pytest.mark.parametrize(
    "password", ["p@ssw0rd", "pa/ss/word", "pass#word?x", "pass:word", "pass word", "pa%2Fss@word"]
)
@pytest.mark.parametrize("start", ["http://", "HTTPS://", "postgresql://", "mysql+pymysql://", "http:/"])
def test_no_part_of_a_password_is_shown(start: str, password: str) -> None:
    address = f"{start}someone:{password}@host:5000/x"
    shown = f"{start}***@host:5000/x"
    assert mask(address) == shown
    with pytest.raises(UsageError, match="--mlflow: must not hold a user or password") as caught:
        cli.parse(preset("arplus"), ["--mlflow", address], prog="job", description="")
    assert password not in str(caught.value)
    if "://" in start:
        assert redact(f"{{'uri': '{address}'}}") == f"{{'uri': '{shown}'}}"


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://me:hunter2", "http://***"),
        ("s3://KEY:se/cr+et@bucket/x", "s3://***@bucket/x"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("sqlite:////home/me@host/x.db", "sqlite:////home/me@host/x.db"),
        ("file:///home/me@host/x", "file:///home/me@host/x"),
        ("http://host/x?token=hunter2", "http://host/x?***"),
        ("postgresql://host/db?sslpassword=hunter2@x", "postgresql://***"),
        ("me:hunter2@host:5000", "***@host:5000"),
        ("http://[::1]:5000/x", "http://[::1]:5000/x"),
    ],
)
def test_what_could_be_a_credential_is_masked(address: str, shown: str) -> None:
    assert mask(address) == shown


# ------------------------------------------------------------------------------------------------------- environment


def test_a_cluster_of_our_own_answers_nobody_without_its_token(ray_cluster: None) -> None:
    import ray._private.worker

    url = f"http://{ray._private.worker.get_dashboard_url()}/api/jobs/"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=30)
    request = urllib.request.Request(url, headers={"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        assert answer.status == 200


@pytest.fixture
def ray_folder() -> Iterator[Path]:
    """Ray's temporary folder; a short path, because sockets lie in it."""
    folder = Path(tempfile.mkdtemp(prefix="arplus-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


@pytest.mark.timeout(400)
@pytest.mark.usefixtures("generator", "forked_workers")
def test_planted_secrets_are_found_nowhere(s3_server: Any, tmp_path: Path, ray_folder: Path) -> None:
    """A run that leaves a checkpoint and then fails, with all on S3, whose secret is one of those planted."""
    planted = {"MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "p1anted-mlflow-password"}
    planted |= {"RAY_AUTH_TOKEN": "p1anted-ray-token" * 4, "RAY_TMPDIR": str(ray_folder)}
    environment = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")} | planted
    home = s3_server.uri("secrets")
    commands = [
        f"jobs/synthesize.py --records 300 --output {home}/raw",
        f"jobs/prepare.py --valid 0.1 --test 0.1 --input {home}/raw --output {home}/data",
        f"jobs/train.py arplus --tiny --data {home}/data --storage {home}/runs --run-name failing --audit True "
        f"--mlflow sqlite:///{tmp_path}/mlflow.db --max-steps 2 --checkpoint-every 1 --max-failures 0",
    ]
    command = [sys.executable, "-c", JOBS, *commands]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=360
    )
    said = done.stdout.decode(errors="replace")
    assert "exit codes [1]" in said, said
    assert "Traceback" in said
    assert "its workers failed" in said

    found = {"output": done.stdout}
    found |= {uri: storage.read_bytes(uri) for uri in storage.list_files(home)}
    for folder in (tmp_path, ray_folder):
        found |= {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and not p.is_symlink()}
    secrets = [planted["MLFLOW_TRACKING_PASSWORD"], planted["RAY_AUTH_TOKEN"]]
    secrets += [s3_server.environment["AWS_SECRET_ACCESS_KEY"]]
    leaks = {where for where, content in found.items() for secret in secrets if secret.encode() in content}
    assert leaks == set()

    def names_of(part: str) -> str:
        return json.dumps([where for where, content in found.items() if part.encode() in content])

    # The search does find what is there: in logs of Ray's processes, in the runs' folders, in MLflow.
    assert "/logs/" in names_of("out of bounds")
    assert "runs/failing/checkpoints/step-00000001-attempt-1/config.json" in names_of("plateau_patience")
    assert "mlflow.db" in names_of("optimizer.plateau_patience")
    assert "data_card" in names_of("<html")


def test_trials_are_handed_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tune's own list of variables has AWS's, in a runtime_env that the dashboard shows."""
    from ray.tune.execution.class_cache import _ActorClassCache

    from arplus.study import execute, trial

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "p1anted")
    execute.set_environment()
    handed = _ActorClassCache().get(trial.TrialProcess)._default_options["runtime_env"]["env_vars"]
    assert "PL_DISABLE_FORK" in handed
    assert "p1anted" not in handed.values()
