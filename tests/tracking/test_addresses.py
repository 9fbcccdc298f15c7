"""Where runs go and where they are seen."""

import tempfile

import pytest

from arplus.errors import UsageError
from arplus.tracking import RunRef, check_reachable, compare_url, default_uri, open_command, run_url, study_url
from arplus.tracking.run import record_of


def test_the_default_is_a_sqlite_file_under_local_storage(tmp_path, monkeypatch):
    assert default_uri(str(tmp_path)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.chdir(tmp_path)
    assert default_uri("runs") == f"sqlite:///{tmp_path}/runs/mlflow.db"
    with pytest.raises(UsageError, match=r"s3://bucket/runs.*--mlflow"):
        default_uri("s3://bucket/runs")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert default_uri("s3://bucket/runs") == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:p1anted@127.0.0.1:5000")
    with pytest.raises(UsageError, match="MLFLOW_TRACKING_PASSWORD") as error:
        default_uri("s3://bucket/runs")
    assert "p1anted" not in str(error.value)


@pytest.mark.parametrize("uri", ["runs/mlruns", "file:///x", "postgresql://u:hunter2@h/db"])
def test_other_stores_are_refused(uri):
    with pytest.raises(UsageError, match="--mlflow") as caught:
        check_reachable(uri)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("uri", ["http://", "http:///x", "http://h:99999", "http://h:x", "https://h h", "http://[::1"])
def test_an_address_that_cannot_be_is_refused_at_once(uri):
    with pytest.raises(UsageError, match=r"--mlflow http.*: must be http://HOST:PORT") as caught:
        check_reachable(uri)
    assert caught.value.exit_code == 2


def test_a_folder_is_no_sqlite_file(tmp_path):
    for uri in (f"sqlite:///{tmp_path}", f"sqlite:///{tmp_path}/", "sqlite:///"):
        with pytest.raises(UsageError, match="is a folder; name MLflow's file") as caught:
            check_reachable(uri)
        assert caught.value.exit_code == 2


def test_how_to_open_a_run(tmp_path):
    local = RunRef(f"sqlite:///{tmp_path}/mlflow.db", "3", "abc")
    assert f"ui --workers 1 --backend-store-uri sqlite:///{tmp_path}/mlflow.db" in open_command(local.uri)
    assert run_url(local) == "http://127.0.0.1:5000/#/experiments/3/runs/abc?workflowType=machine_learning"
    remote = RunRef("https://mlflow.example.org", "3", "abc")
    assert open_command(remote.uri) is None
    assert run_url(remote) == "https://mlflow.example.org/#/experiments/3/runs/abc?workflowType=machine_learning"


def test_where_runs_are_compared():
    runs = [RunRef("http://h:5000", "7", "a"), RunRef("http://h:5000", "7", "b")]
    assert study_url(runs[0]) == "http://h:5000/#/experiments/7/runs?workflowType=machine_learning"
    assert compare_url(runs) == (
        "http://h:5000/#/compare-runs?runs=%5B%22a%22%2C%20%22b%22%5D&experiments=%5B%227%22%5D"
        "&workflowType=machine_learning"
    )


def test_sqlite_is_not_kept_where_mlflow_would_not_find_it():
    with pytest.raises(UsageError, match=r"100%.*--mlflow"):
        default_uri("/tmp/100%/runs")


def test_a_temporary_record_lies_in_a_folder_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    record = record_of(RunRef("http://h", "1", "abc"), "s3://bucket/run")
    assert record.parent.stat().st_mode & 0o777 == 0o700
    record.parent.rmdir()
    record.parent.symlink_to(tmp_path)
    with pytest.raises(UsageError, match="TMPDIR"):
        record_of(RunRef("http://h", "1", "abc"), "s3://bucket/run")
