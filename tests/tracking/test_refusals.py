"""What MLflow or its artifact store will never take is given up at once and named, and everything else arrives."""

import json
import os
import subprocess
import sys
import time
from http.server import ThreadingHTTPServer

import pytest
import requests
from boto3.exceptions import S3UploadFailedError
from botocore import exceptions as boto
from helpers.answers import Answers, serving
from helpers.logged_runs import begin, points
from mlflow.exceptions import MlflowException, RestException

from arplus.errors import RefusedError, ResourceError
from arplus.tracking import RunRef, Tracker, client, start_run
from arplus.tracking import replay as replay_record
from arplus.tracking.refusal import is_final, kind_of


class Store(ThreadingHTTPServer):
    """An artifact store, or a proxy before MLflow, that answers every request as it is told to."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.uri = f"http://127.0.0.1:{self.server_port}"
        self.status = 200
        self.broken = ""  # answers 500 to paths that hold it
        self.pause = 0.0
        self.body = b"no"
        self.taken = []
        self.asked = 0


class Answer(Answers):
    def answer(self):
        time.sleep(self.server.pause)
        self.server.asked += 1
        broken = self.server.broken and self.server.broken in self.path
        self.say(500 if broken else self.server.status, self.server.body)
        if self.server.status == 200 and not broken:
            self.server.taken.append(self.path.rpartition("/artifacts/")[2])


@pytest.fixture
def artifacts():
    running = Store()
    with serving(running):
        yield running
        running.pause = 0


@pytest.fixture
def without_keys(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))


def begin_at(store, location):
    """A run in an experiment whose artifacts lie at ``location``."""
    name = f"at {location}"
    mlflow = client.connect(store)
    if mlflow.get_experiment_by_name(name) is None:
        mlflow.create_experiment(name, artifact_location=location)
    return start_run(store, name, "r", tags={}, params={})


def log_all(tracker, folder):
    """Artifacts before, between and after the metrics, as a run logs them."""
    (folder / "weights.bin").write_bytes(b"weights")
    tracker.log_text("config.json", "{}")
    for step in range(3):
        tracker.log({"train/loss": float(step)}, step)
        tracker.log_file(folder / "weights.bin", "checkpoint")
    tracker.set_tags({"note": "yes"})


def assert_all_but_artifacts(store, run):
    found = client.connect(store).get_run(run.run_id)
    assert (found.info.status, found.data.tags["note"]) == ("FINISHED", "yes")
    assert points(store, run.run_id, "train/loss") == [(step, float(step)) for step in range(3)]


def warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("arplus") and r.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "MLFLOW_TRACKING_PASSWORD"), (403, "right to write"), (404, "is gone"), (413, "client_max_body_size")],
)
def test_refused_artifacts_are_named_and_hold_up_nothing(store, artifacts, tmp_path, caplog, status, advice):
    artifacts.status = status
    run = begin_at(store, artifacts.uri)
    start = time.monotonic()
    tracker = Tracker(run, record=tmp_path / "r.jsonl")
    log_all(tracker, tmp_path)
    assert tracker.close("FINISHED") == 4
    assert time.monotonic() - start < 10
    assert_all_but_artifacts(store, run)
    refused, summary = warnings(caplog)
    assert "artifact config.json" in refused
    assert str(status) in refused
    assert advice in refused
    assert "lacks 4 logged values (artifact config.json, artifact checkpoint/weights.bin)" in summary
    with pytest.raises(ResourceError, match=r"^2 values could not be sent.*\n  2 \(artifact config.json, artifact ch"):
        replay_record(tmp_path / "r.jsonl", store)
    artifacts.status = 200
    assert replay_record(tmp_path / "r.jsonl", store) == 2


@pytest.mark.processes
def test_a_bucket_without_keys_holds_up_nothing(store, without_keys, tmp_path, caplog):
    run = begin_at(store, "s3://nobodys-bucket/artifacts")
    tracker = Tracker(run, record=tmp_path / "r.jsonl")
    log_all(tracker, tmp_path)
    assert tracker.close("FINISHED") == 4
    assert_all_but_artifacts(store, run)
    refused, _ = warnings(caplog)
    assert "config.json: Unable to locate credentials; set AWS_ACCESS_KEY_ID" in refused

    # A server that lacks all of it is sent the rest, and the exit code says that some of it is not there.
    again = begin_at(store, "s3://nobodys-bucket/artifacts")
    text = (tmp_path / "r.jsonl").read_text().replace(run.run_id, again.run_id)
    (tmp_path / "r.jsonl").write_text(text)
    command = [sys.executable, "-m", "arplus.tracking", "replay", str(tmp_path / "r.jsonl"), "--mlflow", store]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3
    assert done.stdout.startswith("5 values sent to MLflow")
    assert "error: 2 values could not be sent, and stay in the record" in done.stderr
    assert "Unable to locate credentials" in done.stderr
    assert_all_but_artifacts(store, again)


def test_a_package_that_is_missing_and_a_file_that_is_gone_are_named(store, tmp_path, caplog):
    run = begin_at(store, "gs://bucket/artifacts")
    with Tracker(run, record=tmp_path / "r.jsonl") as tracker:
        log_all(tracker, tmp_path)
    assert_all_but_artifacts(store, run)
    assert "install the package" in caplog.text
    local = begin(store)
    with Tracker(local, record=tmp_path / "s.jsonl") as tracker:
        tracker.log_file(tmp_path / "never.png")
        log_all(tracker, tmp_path)
    assert tracker.dropped == 1
    assert_all_but_artifacts(store, local)
    assert "artifact never.png: [Errno 2] No such file or directory" in caplog.text
    with pytest.raises(ResourceError, match=r"^1 values could not be sent.*\n.*never\.png"):
        replay_record(tmp_path / "s.jsonl", store)


@pytest.mark.processes
def test_status_and_metrics_do_not_wait_for_a_slow_file(store, artifacts, tmp_path):
    artifacts.pause = 30
    run = begin_at(store, artifacts.uri)
    tracker = Tracker(run, record=tmp_path / "r.jsonl")
    log_all(tracker, tmp_path)
    start = time.monotonic()
    assert tracker.close("FINISHED", timeout=2) == 4
    assert time.monotonic() - start < 4
    assert_all_but_artifacts(store, run)


@pytest.mark.processes
def test_a_file_that_fails_again_and_again_lets_the_others_pass(store, artifacts, tmp_path):
    artifacts.broken = "config.json"
    tracker = Tracker(begin_at(store, artifacts.uri), record=tmp_path / "r.jsonl")
    log_all(tracker, tmp_path)
    assert tracker.close("FINISHED", timeout=3) == 1
    assert artifacts.taken == ["checkpoint/weights.bin"] * 3


@pytest.mark.parametrize("status", [408, 425, 429, 500, 503])
def test_a_store_that_is_away_for_a_moment_loses_nothing(store, artifacts, tmp_path, status):
    artifacts.status = status
    tracker = Tracker(begin_at(store, artifacts.uri), record=tmp_path / "r.jsonl")
    tracker.log_text("config.json", "{}")
    deadline = time.monotonic() + 20
    while artifacts.asked == 0 and time.monotonic() < deadline:
        time.sleep(0.02)
    artifacts.status = 200
    assert tracker.close("FINISHED") == 0
    assert artifacts.taken == ["config.json"]


@pytest.mark.parametrize("body", [b"no", b'{"message": "Unauthorized"}'])
def test_a_wrong_password_in_mid_run_is_said_once_a_kind(artifacts, tmp_path, caplog, body):
    artifacts.status, artifacts.body = 401, body
    tracker = Tracker(RunRef(artifacts.uri, "1", "0" * 32), record=tmp_path / "r.jsonl")
    for step in range(50):
        tracker.log({"a": 1.0, "b": 2.0}, step)
        time.sleep(0.01)  # batches of their own
    log_all(tracker, tmp_path)
    start = time.monotonic()
    assert tracker.close("FINISHED") == 100 + 3 + 4 + 1 + 1
    assert time.monotonic() - start < 10
    said = warnings(caplog)
    assert len(said) == 3, said  # of values, of artifacts, and the end's
    assert artifacts.asked < 120, "no refused batch is split"


def test_a_wrong_value_takes_no_other_of_its_batch_with_it(store, tmp_path, caplog):
    run = begin(store)
    tracker = Tracker(run, record=tmp_path / "r.jsonl")
    tracker.log({"good": 1.0, "not a key!": 1.0, "fine": 2.0, "../up": 1.0, "last": 3.0}, 1)
    tracker.log({"good": 2.0}, 2)
    assert tracker.close("FINISHED") == 2
    assert points(store, run.run_id, "good") == [(1, 1.0), (2, 2.0)]
    assert points(store, run.run_id, "last") == [(1, 3.0)]
    assert "metric not a key!" in caplog.text
    with pytest.raises(ResourceError, match=r"^2 values could not be sent.*\n.*metric not a key!, metric \.\./up"):
        replay_record(tmp_path / "r.jsonl", store)


def test_a_run_that_is_gone_holds_up_no_other_of_the_records(store, tmp_path):
    run = begin(store)
    events = [
        {"run_id": "f" * 32, "timestamp": 1, "key": "a", "value": 1.0, "step": 1},
        {"run_id": "f" * 32, "timestamp": 2, "artifact": "a.txt", "text": "a"},
        {"run_id": run.run_id, "timestamp": 3, "key": "a", "value": 1.0, "step": 1},
        {"run_id": run.run_id, "timestamp": 4, "artifact": "a.txt", "text": "a"},
    ]
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    with pytest.raises(ResourceError, match=r"^2 values could not be sent") as caught:
        replay_record(tmp_path / "r.jsonl", store)
    assert caught.value.sent == 2
    assert points(store, run.run_id, "a") == [(1, 1.0)]


@pytest.mark.processes
@pytest.mark.parametrize("what", ["run", "experiment"])
def test_a_deleted_run_is_asked_once_and_named(store, tmp_path, caplog, monkeypatch, what):
    """MLflow answers 400, as to one wrong value, whereupon each of a thousand values would be sent by itself."""
    run = start_run(store, f"deleted {what}", "r", tags={}, params={})
    mlflow = client.connect(store)
    mlflow.delete_run(run.run_id) if what == "run" else mlflow.delete_experiment(run.experiment_id)
    asked = []
    send = client.send
    monkeypatch.setattr("arplus.tracking.tracker.send", lambda *a: (asked.append(len(a[1])), send(*a)))
    tracker = Tracker(run, record=tmp_path / "r.jsonl")
    tracker.log({f"m{i}": 1.0 for i in range(900)}, 1)
    assert tracker.close("FINISHED") == 901
    assert sorted(asked) == [1, 900]
    said, _ = warnings(caplog)
    assert "is gone: restore it" in said
    with pytest.raises(ResourceError, match=r"^901 values could not be sent.*\n.*is gone: restore it"):
        replay_record(tmp_path / "r.jsonl", store)


@pytest.mark.parametrize(
    ("status", "advice"),
    [(401, "set MLFLOW_TRACKING_USERNAME"), (404, "check the address"), (502, "start it"), (200, "start it")],
)
def test_a_page_instead_of_mlflow_is_named_by_its_words(artifacts, status, advice):
    page = (
        b"<!DOCTYPE html><html><head><style>p { color: red }</style></head><body><h1>Sign in</h1>to go on</body></html>"
    )
    artifacts.status, artifacts.body = status, page
    with pytest.raises(
        ResourceError, match=rf"^MLflow at {artifacts.uri} cannot be used.*{advice}.*--mlflow"
    ) as caught:
        start_run(artifacts.uri, "e", "r", tags={}, params={})
    assert isinstance(caught.value, RefusedError) == (status in (401, 404)), "a study waits less for what refuses it"
    assert caught.value.exit_code == 3
    assert "<" not in str(caught.value)
    assert ("Sign in to go on" in str(caught.value)) == (status != 502), "MLflow's client keeps that page to itself"


def test_a_status_that_was_not_sent_yet_is_replaced(no_server, tmp_path):
    tracker = Tracker(no_server, record=tmp_path / "r.jsonl")
    tracker.mark("KILLED")
    assert tracker.close("FINISHED", timeout=0.1) == 1


def client_error(code, status):
    return boto.ClientError(
        {"Error": {"Code": code, "Message": "m"}, "ResponseMetadata": {"HTTPStatusCode": status}}, "PutObject"
    )


def caused(error, cause):
    error.__context__ = cause
    return error


def answer(status):
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError(f"{status} Error", response=response)


@pytest.mark.parametrize(
    ("error", "final", "kind"),
    [
        (boto.NoCredentialsError(), True, "NoCredentialsError"),
        (boto.PartialCredentialsError(provider="env", cred_var="x"), True, None),
        (boto.CredentialRetrievalError(provider="sso", error_msg="x"), True, None),
        (boto.TokenRetrievalError(provider="sso", error_msg="x"), True, None),
        (boto.UnauthorizedSSOTokenError(), True, None),
        (boto.ProfileNotFound(profile="x"), True, None),
        (boto.NoRegionError(), True, None),
        (boto.ParamValidationError(report="Invalid bucket name"), True, None),
        (boto.EndpointConnectionError(endpoint_url="http://x"), False, None),
        (boto.ConnectTimeoutError(endpoint_url="http://x"), False, None),
        (boto.ReadTimeoutError(endpoint_url="http://x"), False, None),
        (boto.ConnectionClosedError(endpoint_url="http://x"), False, None),
        (boto.SSLError(endpoint_url="https://x", error="EOF occurred"), False, None),
        (boto.SSLError(endpoint_url="https://x", error="[SSL: CERTIFICATE_VERIFY_FAILED]"), True, None),
        *((client_error(c, 403), True, "HTTP 403") for c in ("AccessDenied", "InvalidAccessKeyId")),
        *((client_error(c, 403), True, None) for c in ("SignatureDoesNotMatch", "RequestTimeTooSkewed", "403")),
        (client_error("NoSuchBucket", 404), True, "HTTP 404"),
        (client_error("ExpiredToken", 400), True, None),
        (client_error("EntityTooLarge", 400), True, None),
        (client_error("PermanentRedirect", 301), True, None),
        (client_error("SlowDown", 503), False, None),
        (client_error("InternalError", 500), False, None),
        (client_error("RequestTimeout", 400), False, None),
        (client_error("Throttling", 400), False, None),
        (caused(S3UploadFailedError("x"), client_error("AccessDenied", 403)), True, "HTTP 403"),
        (caused(S3UploadFailedError("x"), client_error("SlowDown", 503)), False, None),
        *((answer(s), True, f"HTTP {s}") for s in (400, 401, 402, 403, 404, 405, 409, 410, 411, 413, 415, 422, 451)),
        (answer(501), True, "HTTP 501"),
        *((answer(s), False, f"HTTP {s}") for s in (408, 425, 429, 500, 502, 503, 504, 507, 520, 529)),
        *((MlflowException(f"failed with error code {s} != 200"), True, f"HTTP {s}") for s in (403, 413)),
        (MlflowException("failed with error code 425 != 200"), False, None),
        (MlflowException("API request to x failed with exception too many 500 error responses"), False, None),
        (RestException({"error_code": "PERMISSION_DENIED", "message": "m"}), True, "HTTP 403"),
        (RestException({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "m"}), True, "HTTP 404"),
        (RestException({"error_code": "INVALID_STATE", "message": "m"}), True, None),
        (RestException({"error_code": "TEMPORARILY_UNAVAILABLE", "message": "m"}), False, None),
        (RestException({"error_code": "REQUEST_LIMIT_EXCEEDED", "message": "m"}), False, None),
        (RestException({"error_code": "INTERNAL_ERROR", "message": "m"}), False, None),
        (RestException({"message": "Forbidden"}), True, None),
        (RestException({"status": 503, "error": "later"}), False, None),
        (MlflowException("(sqlite3.OperationalError) database is locked"), False, None),
        (MlflowException("QueuePool limit of size 5 overflow 10 reached", error_code=1), False, None),
        (MlflowException("Could not find a registered artifact repository for: xyz://a"), True, None),
        (FileNotFoundError("x"), True, None),
        (PermissionError("x"), True, None),
        (ModuleNotFoundError("No module named 'azure'"), True, None),
        (ValueError("Invalid endpoint: x"), True, None),
        (OSError(28, "No space left on device"), False, None),
        (ConnectionRefusedError("x"), False, None),
        (TimeoutError("x"), False, None),
        (requests.ConnectionError("x"), False, None),
        (requests.JSONDecodeError("x", "", 0), False, None),
        (RuntimeError("whatever"), False, None),
    ],
)  # fmt: skip
def test_what_can_never_succeed_is_told_apart(error, final, kind):
    assert is_final(error) == final
    if kind is not None:
        assert kind_of(error) == kind
