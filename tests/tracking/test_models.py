"""A registered model is a model: MLflow loads, serves and describes it, and every job takes it by name."""

import ast
import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers.commands import run
from helpers.logged_runs import begin, free_port
from helpers.prepared import random_state, write_dataset

from arplus import tracking
from arplus.config import Sampling
from arplus.errors import UsageError
from arplus.evaluation.replies import Responder, raw_profile
from arplus.evaluation.served import FLAVOR
from arplus.runs import checkpoint
from arplus.training import publish

pytestmark = [pytest.mark.timeout(300), pytest.mark.processes]
NAME = "模型 1"
STATE = random_state()
ASKED = "一丁\n丂七丄"
PERSONA = {"gender": "男", "location": "词3", "tags": "词4;词5"}


@pytest.fixture(scope="module")
def registered(store, tmp_path_factory):
    """A run's folder with one checkpoint, sent to MLflow and registered twice."""
    folder = tmp_path_factory.mktemp("run")
    dataset = write_dataset(folder / "data", {"train": [[4]], "valid": [[3]]})
    runs = []
    for number in range(2):
        uri = str(folder / f"run-{number}")
        weights = {name: value + 0.01 * number for name, value in STATE.weights.items()}
        checkpoint.save(uri, replace(STATE, weights=weights))
        tracked = begin(store)
        with tracking.Tracker(tracked, record=folder / f"{number}.jsonl") as tracker:
            model = publish.log_best(tracker, uri, dataset)
        publish.register(tracked, model, NAME, None if number else "best", {"response_ppl": "9.5"}, tracker.dropped)
        runs.append(tracked)
    return runs


@pytest.fixture
def environment(store, registered):
    """That of a process of MLflow's own, which knows this package because it is installed."""
    programs = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # MLflow starts uvicorn by its name
    return os.environ | {"PATH": programs, "MLFLOW_TRACKING_URI": store, "MLFLOW_DISABLE_TELEMETRY": "true"}


def expected(seed=0):
    profile = raw_profile(*PERSONA.values())
    return Responder(STATE, profile, Sampling(), seed).reply(ASKED.splitlines())


def test_a_model_answers_over_http_as_chat_does(environment):
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", f"models:/{NAME}@best", "--port", str(port)]
    server = subprocess.Popen([*command, "--env-manager", "local"], env=environment, start_new_session=True)
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while True:
            try:
                urllib.request.urlopen(f"{url}/ping", timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.3)
        one = {"context": ASKED, **PERSONA}
        assert ask(url, dataframe_records=[one], params={"seed": 7}) == [{"reply": expected(seed=7)}]
        several = ask(url, dataframe_records=[one, {"context": "丁"}])
        assert [set(row) for row in several] == [{"reply"}, {"reply"}]
        assert several[0] == {"reply": expected()}
        with pytest.raises(urllib.error.HTTPError) as wrong:
            ask(url, dataframe_records=[one, {"context": " "}])
        assert wrong.value.code in (400, 500)
        assert "row 1: " in wrong.value.read().decode()
        with pytest.raises(urllib.error.HTTPError, match="400"):
            ask(url, dataframe_records=[{"gender": "男"}])
        with pytest.raises(urllib.error.HTTPError) as wrong:
            ask(url, dataframe_records=[one], params={"temperature": -1.0})
        assert "--temperature: must be greater than or equal to 0" in wrong.value.read().decode()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, 9)
        server.wait(10)


def ask(url, **body):
    request = urllib.request.Request(
        f"{url}/invocations", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())["predictions"]


def test_mlflow_loads_it_with_signature_example_and_what_it_needs(environment):
    """In a process that imports nothing of ours itself; what our modules then import is in the requirements."""
    program = f"""
import json, sys
import mlflow
model = mlflow.pyfunc.load_model({f"models:/{NAME}/1"!r})
replies = model.predict(model.input_example)
print(json.dumps([list(replies["reply"]), model.metadata.signature.to_dict(), model.metadata.metadata,
                  [m.__file__ for name, m in sys.modules.items() if name.startswith("arplus")]]))
"""
    found = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    replies, signature, facts, ours = json.loads(found.stdout.splitlines()[-1])
    assert len(replies) == len(FLAVOR.example)
    assert [c["name"] for c in json.loads(signature["inputs"]) if c["required"]] == ["context"]
    assert [p["name"] for p in json.loads(signature["params"])] == list(FLAVOR.params)
    assert facts["preset"] == "arplus"
    imported = {name for file in ours for name in imported_at_once(file)} - {"arplus", *sys.stdlib_module_names}
    brought_by = {"botocore": "boto3", "annotated_types": "annotated-types"}
    needed = {brought_by.get(name, name) for name in imported}
    assert needed <= set(FLAVOR.packages)
    assert "ray" not in needed, "answering needs no Ray"


def imported_at_once(file):
    """What a module imports when it is imported itself."""
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.partition(".")[0]


def test_a_name_of_mlflow_is_a_checkpoint_to_every_reader(store, registered):
    second = f"models:/{NAME}/2"
    artifact = f"runs:/{registered[1].run_id}/checkpoint"
    names = {f"models:/{NAME}/1": 0, f"models:/{NAME}@best": 0, second: 1, f"models:/{NAME}/latest": 1, artifact: 1}
    for uri, number in names.items():
        with tracking.fetched(uri, store) as folder:
            state = checkpoint.load(folder)
        assert all(torch.equal(state.weights[name], value + 0.01 * number) for name, value in STATE.weights.items()), (
            uri
        )
        assert not os.path.exists(folder), "the copy is gone"
    assert tracking.pin(f"models:/{NAME}@best", store) == f"models:/{NAME}/1"
    assert tracking.pin(f"models:/{NAME}/latest", store) == second


def test_what_is_registered_stays_as_it_is_though_its_run_goes_on(store, tmp_path):
    """Three jobs of one run: to step 3, again to step 3, and on to step 4, whose checkpoint is better."""
    uri, dataset = str(tmp_path / "run"), write_dataset(tmp_path / "data", {"train": [[4]], "valid": [[3]]})
    tracked, found = begin(store), []
    for job, step in enumerate((3, 3, 4)):
        weights = {name: value + 0.01 * step for name, value in STATE.weights.items()}
        saved = checkpoint.save(uri, replace(STATE, progress=replace(STATE.progress, step=step), weights=weights))
        checkpoint.mark_best(uri, saved, 9.0 - step)
        with tracking.Tracker(tracked, record=tmp_path / f"{job}.jsonl") as tracker:
            model = publish.log_best(tracker, uri, dataset, new=not job)
        found.append(publish.register(tracked, model, "goes on", None, {"response_ppl": "9"}, tracker.dropped))
        assert tracking.registered(tracked, "goes on") == found[-1]
    assert found == ["models:/goes on/1", "models:/goes on/1", "models:/goes on/2"]
    for version, step in zip(found[1:], (3, 4), strict=True):
        with tracking.fetched(version, store) as folder:
            state = checkpoint.load(folder)
        assert all(torch.equal(state.weights[name], value + 0.01 * step) for name, value in STATE.weights.items()), step


def test_an_alias_that_has_moved_does_not_move_a_run_that_goes_on():
    assert tracking.as_begun("models:/a b@best", "models:/a b/1") == "models:/a b/1"
    assert tracking.as_begun("models:/a b/latest", "models:/a b/1") == "models:/a b/1"
    for other, before in (("models:/a b/2", "models:/a b/1"), ("models:/a@best", "models:/a b/1"), ("runs/x", None)):
        assert tracking.as_begun(other, before) == other


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        (f"models:/{NAME}/7", "does not have it"),
        (f"models:/{NAME}@worst", "does not have it"),
        ("models:/", "must be models:/NAME/VERSION, models:/NAME@ALIAS or runs:/ID/checkpoint"),
        ("models:/x", "must be models:/NAME/VERSION"),
        ("runs:/0123/checkpoint", "does not have it"),
        ("runs:/{run}/nothing", "does not have it"),
        ("runs:/{run}/sample_replies.txt", "is not a checkpoint of arplus; a run has its best one as"),
    ],
)
def test_a_name_that_is_wrong_is_said(store, registered, uri, says):
    uri = uri.format(run=registered[0].run_id)
    with pytest.raises(UsageError, match=f"^{uri}: .*{says}"), tracking.fetched(uri, store):
        pass


def test_without_a_server_the_flag_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with (
        pytest.raises(UsageError, match=r"^models:/x/1: is a model of MLflow, and sqlite:.*--mlflow"),
        tracking.fetched("models:/x/1", None),
    ):
        pass
    assert not list(tmp_path.iterdir()), "and none is made"


def test_chat_and_export_take_it(store, registered, tmp_path):
    said = run(f"jobs/chat.py --checkpoint 'models:/{NAME}@best' --mlflow {store} --gender 男 --location 词3 "
               "--tags '词4;词5' --say 一丁 --seed 3")  # fmt: skip
    assert said.stdout.strip() == Responder(STATE, raw_profile(*PERSONA.values()), Sampling(), 3).reply(["一丁"])
    exported = run(f"jobs/export.py --checkpoint 'models:/{NAME}/2' --mlflow {store} --output {tmp_path}/out")
    assert exported.returncode == 0, exported.stderr
    weights = checkpoint.load(f"{tmp_path}/out").weights
    assert all(torch.equal(weights[name], value + 0.01) for name, value in STATE.weights.items())
