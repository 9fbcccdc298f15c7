"""Nodes that are asked, and workers that cannot start: what they said last is in the error."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from arplus.cluster import nodes
from arplus.errors import ResourceError

ASK = """
from arplus.cluster import connection, nodes
from arplus.config import PrepareConfig
from arplus.prepare.pipeline import prepare
from arplus.errors import ResourceError

def look(_): pass

connection.connect(cpus=1)
nodes.ANSWER_S = 4.0
for work in (lambda: nodes.ask(look), lambda: prepare(PrepareConfig(input="records.jsonl", output="data"))):
    try:
        work()
    except ResourceError as error:
        print(error)
"""


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_cannot_start_is_heard(tmp_path: Path) -> None:
    """As where `uv run` on a cluster makes an empty environment; Ray itself would try for ever.

    On a cluster of its own, since Ray lets no other worker start for a minute after that; the other is not asked.
    """
    (tmp_path / "records.jsonl").write_text("{}\n")
    empty = f"{sys.executable} -c 'raise ModuleNotFoundError(\"No module named ray\")'"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment["RAY_JOB_CONFIG_JSON_ENV_VAR"] = json.dumps({"runtime_env": {"py_executable": empty}})
    command = [sys.executable, "-c", ASK]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    asked, prepared = done.stdout.splitlines()
    ended = "the last line of a worker that ended there: ModuleNotFoundError: No module named ray; workers need"
    assert re.match(rf"node \S+ \(\w+\): no answer within 4 s; {ended}", asked)
    assert re.match(rf"node \S+ \(\w+\): no worker within 4 s; {ended}", prepared)
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]


def fails(_: str) -> None:
    raise ValueError("not here")


@pytest.mark.usefixtures("ray_cluster")
def test_a_question_that_a_node_fails_at() -> None:
    """As a worker does that lacks this project, or a package of it."""
    with pytest.raises(ResourceError, match=r"node \S+ \(\w+\): (ValueError: not here|ModuleNotFoundError: .*)"):
        nodes.ask(fails)


@pytest.mark.usefixtures("ray_cluster")
def test_a_node_that_is_slow_is_waited_for(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On a busy machine a worker takes longer to start than it takes to find out that it cannot."""
    monkeypatch.setattr(nodes, "ANSWER_S", 0.1)

    def look(_: str) -> int:
        time.sleep(1.0)
        return 3

    assert list(nodes.ask(look).values()) == [3]
    (said,) = caplog.messages
    assert re.match(r"no answer from \S+ \(\w+\) within 0 s: its workers start slowly, so the job waits", said)


@pytest.mark.usefixtures("ray_cluster")
def test_workers_that_start_are_no_problem() -> None:
    nodes.check_workers()
