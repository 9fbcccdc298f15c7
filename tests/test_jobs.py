"""The commands as a user types them: each mistake ends in one line, the right exit code, and nothing half-written."""

import gzip
import io
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.commands import ROOT, away, run, run_all, shared, words

from arplus.errors import UsageError

TERMINAL = """
import os, pty, sys
sys.exit(os.waitstatus_to_exitcode(pty.spawn(["sh", "-c", 'stty cols 120 rows 40; exec "$@"', "-", *sys.argv[1:]])))
"""
"""Runs a command on a terminal, whose keys are this process's input."""


def interrupted(command: str, folder: Path) -> tuple[int, list[str]]:
    """Exit code of a training on a terminal, with Ctrl-C once it has logged steps and drawn a bar, and all lines."""
    output = folder / "output"
    terminal = [sys.executable, "-c", TERMINAL, sys.executable, *words(command)]
    with open(output, "w") as file:
        job = subprocess.Popen(terminal, cwd=folder, env=away(), stdin=subprocess.PIPE, stdout=file, stderr=file)
    deadline = time.monotonic() + 150
    try:
        while not re.search(r"\d%\|.* step \d+/.*\d%\|", said := output.read_text(), re.DOTALL):
            assert job.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.1)
    finally:
        job.communicate(b"\x03", timeout=100)
    return job.returncode, shown(output.read_bytes().decode())


def shown(text: str) -> list[str]:
    """The lines that a terminal shows in the end: what follows a carriage return is written over what was there."""
    lines = []
    for line in re.sub(r"\x1b\[\d*m", "", text).split("\n"):
        cells = ""
        for part in line.split("\r"):
            cells = part + cells[len(part) :]
        lines.append(cells.rstrip())
    return lines


def test_what_is_typed_in_another_encoding_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ask = runpy.run_path(str(ROOT / "jobs/chat.py"))["_ask"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("你好\n".encode("gbk")), encoding="utf-8"))
    with pytest.raises(UsageError, match="standard input: is not UTF-8 text"):
        ask()


def alarming(text: str) -> list[str]:
    """Lines that a user would take for an error, and Ray Data's running commentary."""
    odd = re.compile(r"error|exception|traceback|fail|\bE \d+ |Dataset dataset_|Execution plan", re.I)
    return [line for line in text.splitlines() if odd.search(line)]


def record(i: int) -> str:
    profile = {"tag": ["a"], "loc": "四川 成都", "gender": "male"}
    return json.dumps({"dialog": [[f"你 好 {i}"], ["好"]], "profile": [profile, profile], "uid": [0, 1]}) + "\n"


MISTAKES = {
    "jobs/train.py arpluss --dry-run": "unknown preset 'arpluss'; the presets are ar, arplus,",
    "jobs/train.py arplus --dry-run --objective.lambda1 -1": "--objective.lambda1: .*greater than or equal to 0",
    "jobs/train.py arplus --dry-run --workers 0": "--workers: must be a number N or a range MIN:MAX, at least 1",
    "jobs/train.py arplus --dry-run --learning-rate 1": "unknown flag '--learning-rate' .--help lists all flags",
    "jobs/train.py arplus --dry-run --optimizer.only gates": "--optimizer.only: .*'gates'; it has character table, ",
    "jobs/train.py arplus --dry-run --data nowhere": "nowhere: not a prepared data set",
    "jobs/train.py arplus --dry-run --batch-size 3 --workers 2:4": "--batch-size: must be at least .* = 4",
    "jobs/chat.py --checkpoint nowhere --say 你好": "nowhere: no complete checkpoint there",
    "jobs/evaluate.py --data nowhere": "--checkpoint: is required",
    "jobs/train.py arplus": "--data: is required",
    "jobs/tune.py arplus": "--data: is required",
    "jobs/lr_find.py arplus": "--data: is required",
    "jobs/ablate.py": "--data: is required",
}


@pytest.mark.processes
def test_mistakes_on_the_command_line(tmp_path: Path) -> None:
    for (command, message), (code, said) in zip(MISTAKES.items(), run_all(list(MISTAKES), tmp_path), strict=True):
        assert code == 2, said
        assert re.search(message, said), said
        assert len(said.splitlines()) == 1, f"{command}: one clear message, no traceback, and no Ray was started"
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("ray_cluster")
def test_a_truncated_gzip_leaves_no_data_set(tmp_path: Path) -> None:
    whole = gzip.compress("".join(record(i) for i in range(2000)).encode())
    (tmp_path / "records.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    result = run(f"jobs/prepare.py --input {tmp_path}/records.jsonl.gz --output {tmp_path}/data", environment=shared())
    assert result.returncode == 2, result.stderr
    assert "records.jsonl.gz" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "data" / "manifest.json").exists()
    again = run(f"jobs/train.py arplus --dry-run --data {tmp_path}/data")
    assert "not a prepared data set" in again.stderr


@pytest.mark.usefixtures("generator", "ray_cluster")
def test_from_records_to_a_reply(tmp_path: Path) -> None:
    """The road of the README on a handful of records, each job as its own process; the last has a Ray of its own."""
    train = "jobs/train.py arplus-weighted --tiny --data data --storage runs --batch-size 12"
    commands = [
        "jobs/synthesize.py --records 400 --duplicates 20 --broken 4 --persona-answers 0.5 --seed 1 --output raw",
        "jobs/prepare.py --input raw --output data --valid 0.05 --test 0.05",
        f"{train} --run-name first --workers 3 --max-steps 4",
        "jobs/evaluate.py --checkpoint runs/first --data data --split test --json result.json",
        "jobs/chat.py --checkpoint runs/first --gender 男 --location '四川 成都' --tags 'a;b' --say 你好 --seed 3",
        "jobs/chat.py --checkpoint runs/first --persona-weight 0 --say 你好 --seed 3",
        "jobs/export.py --checkpoint runs/first --output exported",
        "jobs/chat.py --checkpoint exported --gender 男 --location '四川 成都' --tags 'a;b' --say 你好 --seed 3",
    ]
    results = []
    for command in commands:
        results.append(run(command, folder=tmp_path, environment=shared()))
        assert results[-1].returncode == 0, (command, results[-1].stderr[-3000:])
        assert alarming(results[-1].stdout + results[-1].stderr) == [], command
    nexts = [result.stderr.splitlines()[-1].removeprefix("next").strip() for result in results[:4]]
    for said, job in zip(nexts, ("prepare", "train", "evaluate", "chat"), strict=True):
        assert said.startswith(f"python jobs/{job}.py"), said
    shown = dict(line.split(maxsplit=1) for line in results[2].stderr.splitlines()[-4:])
    assert Path(shown["checkpoint"]).parent == tmp_path / "runs" / "first" / "checkpoints"
    assert shown["MLflow"].startswith("http://127.0.0.1:5000/#/experiments/1/runs/")
    assert "about the persona: train" in results[1].stdout
    assert re.search(r"L_D .*, L_LM .* \(L_W .*, mean a 0\.", results[2].stderr)
    assert "predictor" in results[3].stdout
    assert "standard" in results[3].stdout
    assert "paper-compatible" in results[3].stdout
    reply = results[4].stdout.strip()
    assert 1 <= len(reply) <= 15
    assert results[7].stdout.strip() == reply, "an exported model answers as its checkpoint does"
    code, lines = interrupted(f"{train} --run-name stopped --log-every 1 --epochs 500", tmp_path)
    assert code == 130, lines
    *shown_before, last, end = lines
    assert re.match(r"interrupted: stopped at step \d+; the same command goes on from there$", last), lines
    assert not end
    (bar,) = (i for i, line in enumerate(shown_before) if line.startswith("stopped:"))
    assert re.match(r"stopped: +\d+%\|.*\| \d.*(step/s|s/step)\]$", shown_before.pop(bar)), lines
    # What the worker said last may reach the terminal when the bar has ended.
    assert len(shown_before) - bar <= 2, lines
    log = re.compile(r"\d\d:\d\d:\d\d INFO (ray: |told to end)|\(RayTrainWorker pid=\d+\) step ")
    assert all(map(log.match, shown_before)), "neither an empty line, nor one of Ray's, nor half a bar"
    (tmp_path / "data" / "manifest.json").unlink()
    broken = run("jobs/evaluate.py --checkpoint runs/first --data data", folder=tmp_path, environment=shared())
    assert broken.returncode == 2
    assert "not a prepared data set" in broken.stderr


@pytest.mark.ray
def test_a_job_by_uv_run(tmp_path: Path) -> None:
    """Ray's own hook would start the workers by `uv run` too, in a copy of the folder, which has no project here."""
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    if uv is None:
        pytest.skip("uv is not installed; it is among the test requirements")
    (tmp_path / "records.jsonl").write_text("".join(record(i) for i in range(200)))
    settings = {"UV_PROJECT_ENVIRONMENT": sys.prefix, "UV_OFFLINE": "1", "UV_PYTHON_DOWNLOADS": "never"}
    settings |= {"UV_CACHE_DIR": str(tmp_path / "cache")}
    command = [uv, "run", "--no-sync", "--project", ROOT, ROOT / "jobs/prepare.py", "--input", "records.jsonl"]
    done = subprocess.run(
        [*command, "--output", "data", "--valid", "0.1", "--test", "0.1"],
        cwd=tmp_path,
        env=away() | settings,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert "next       python jobs/train.py arplus --data data" in done.stderr
    assert alarming(done.stderr) == []


@pytest.mark.processes
def test_reference_weights_become_a_checkpoint(tmp_path: Path) -> None:
    characters, words = tmp_path / "characters.txt", tmp_path / "persona_words.txt"
    characters.write_text("".join(f"{chr(0x4E00 + i)} {i + 1}\n" for i in range(50)))
    words.write_text("".join(f"词{i}\t-1\n" for i in range(60)))
    export = (
        f"jobs/export.py --from-reference {ROOT}/tests/golden/ar_plus.safetensors --layers 3 --heads 2 "
        f"--character-vocabulary {characters} --persona-vocabulary {words} --output {tmp_path}/model"
    )
    assert run(export).returncode == 0
    talk = run(f"jobs/chat.py --checkpoint {tmp_path}/model --sampling.temperature 0", stdin="丁丁\n\n")
    assert talk.returncode == 0, talk.stderr
    assert talk.stdout.strip()
    characters.write_text("丁 1\n")
    refused = run(export)
    assert refused.returncode == 2
    assert "--character-vocabulary: has 10 tokens" in refused.stderr
