"""The READMEs' commands: every job takes its flags as they stand there, and has an MLflow to go to."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from arplus import cli, storage, tracking
from arplus.config import preset, to_dict

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"^    (?P<before>.*)\bpython (?P<job>jobs/\w+\.py)(?P<flags>[^…#\n]*)(#.*)?$", re.MULTILINE)
"""A line of an indented block that runs a job, and has nothing left out."""
COMMANDS = [
    pytest.param(found, id=f"{name}: {' '.join(found[0].split())[:70]}")
    for name in ("README.md", "cluster/README.md", "arplus/benchmark/README.md")
    for found in COMMAND.finditer((ROOT / name).read_text())
]


class ParsedError(Exception):
    """Ends a job where it has read its command line."""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_job_takes_the_command(command: re.Match[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    validate = cli.validate

    def parsed(config: Any) -> None:
        raise ParsedError(validate(config))

    monkeypatch.chdir(tmp_path)
    storage.write_json("runs/sweep/best_config.json", to_dict(preset("arplus")))  # as a sweep before has left it
    monkeypatch.setattr(cli, "validate", parsed)
    monkeypatch.setattr(sys, "argv", [command["job"], *shlex.split(command["flags"])])
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ParsedError) as caught:
        runpy.run_path(str(ROOT / command["job"]))["main"]()
    config = getattr(caught.value.args[0], "run", caught.value.args[0])
    local = getattr(config, "storage", "").startswith("s3://arplus/")  # local.sh's, whose nodes know their server
    if hasattr(config, "storage") and not config.mlflow and not local:
        tracking.default_uri(config.storage)


def test_all_jobs_are_there() -> None:
    jobs = {command.values[0]["job"] for command in COMMANDS}
    assert jobs == {f"jobs/{path.name}" for path in (ROOT / "jobs").glob("*.py")}
