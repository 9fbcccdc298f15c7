"""README and docs: jobs take the flags that stand there; links, make targets and files that a page names are there."""

import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.local_cluster import submitted_lines

from arplus import cli, storage, tracking
from arplus.config import preset, to_dict

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("cluster/*.md")])
COMMAND = re.compile(r"^ {4,}(?P<before>.*)\bpython (?P<job>jobs/\w+\.py)(?P<flags>[^…#\n]*)(#.*)?$", re.MULTILINE)
"""A line of an indented block that runs a job, and has nothing left out."""
COMMANDS = [
    pytest.param(found, id=f"{page.name}: {' '.join(found[0].split())[:70]}")
    for page in PAGES
    for found in COMMAND.finditer(page.read_text())
]
TARGET = re.compile(r"^([a-z-]+):", re.MULTILINE)
LINK = re.compile(r"\]\((?P<to>[^)#\s]+)?(?:#(?P<heading>[^)]+))?\)|(?:src|srcset)=\"(?P<src>[^\"]+)\"")
NAMED = re.compile(r"(?:`|[ \n])((?:arplus|cluster|docker|docs|jobs|tests)/[\w./-]*\w)(?=[`\s,:;)])")
"""A file or folder of ours in a text."""


class ParsedError(Exception):
    """Ends a job where it has read its command line."""


def test_the_guide_to_clusters_submits_each_job_once() -> None:
    """The soak of submitted jobs runs these lines."""
    jobs = [re.findall(r"^    ray job submit .* -- python (jobs/\w+\.py)", line) for line in submitted_lines()]
    assert sorted(jobs) == [[f"jobs/{path.name}"] for path in sorted(ROOT.glob("jobs/*.py"))]


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Links within the project, headings that they lead to, files, and make targets."""
    text = page.read_text()
    for link in LINK.finditer(text):
        to, heading = link["to"] or link["src"] or page.name, link["heading"]
        if "://" in to:
            continue
        target = page.parent / to
        assert target.exists(), link[0]
        if heading:
            assert heading in headings(target), link[0]
    for name in NAMED.findall(text):
        assert (
            any(place.exists() for place in (ROOT / name, ROOT / "arplus" / name, page.parent / name))
            or page.name == "CHANGELOG.md"
        ), name
    targets = set(TARGET.findall((ROOT / "Makefile").read_text()))
    assert set(re.findall(r"`make ([a-z-]+)", text)) <= targets
    assert set(re.findall(r"^ {4,}make ([a-z-]+)", text, re.MULTILINE)) <= targets


def headings(page: Path) -> set[str]:
    """The anchors that code hosts make of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
