"""A job as a process: how it ends, what its help and its dry run cost, and what a shell completes."""

import gc
import json
import os
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.prepared import write_dataset

from arplus import cli
from arplus.config import preset, to_dict
from arplus.errors import ResourceError, UsageError
from arplus.runs.attempt import StoppedError

REPOSITORY = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (UsageError("--data: is wrong"), 2, "error: --data: is wrong\n"),
        (ResourceError("--workers: too many"), 3, "error: --workers: too many\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (StoppedError("stopped at step 9"), 130, "interrupted: stopped at step 9\n"),
    ],
)
def test_run_ends_with_the_errors_exit_code(
    error: BaseException, code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> None:
        raise error

    with pytest.raises(SystemExit) as caught:
        cli.run(main)
    assert caught.value.code == code
    assert capsys.readouterr() == ("", message)


def test_run_of_a_main_that_returns_goes_on() -> None:
    """Soon to its end: what is frozen Python's end does not look through."""
    done = []
    gc.unfreeze()
    cli.run(lambda: done.append(True))
    assert done
    assert gc.get_freeze_count() > 100_000


def test_any_other_error_exits_1_with_a_traceback() -> None:
    script = "from arplus import cli\ndef main():\n    raise RuntimeError('ours')\ncli.run(main)\n"
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" in ended.stderr
    assert "RuntimeError: ours" in ended.stderr


def job(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A Ray address where nothing listens: a job that joined a cluster would fail.
    environment = os.environ | {"RAY_ADDRESS": "127.0.0.1:1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "jobs/train.py", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=120)


def test_no_jobs_help_imports_ray_or_torch() -> None:
    """Seconds of imports; one process for all, since none of them may."""
    jobs = [[str(file)] for file in sorted(REPOSITORY.glob("jobs/*.py"))]
    jobs += [["jobs/benchmark.py", subject] for subject in ("train", "generate", "scale", "data", "prepare", "faults")]
    script = f"""
import runpy, sys
for words in {jobs!r}:
    sys.argv = [*words, "--help"]
    try:
        runpy.run_path(words[0], run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, words
    assert not {{"ray", "torch", "mlflow"}} & set(sys.modules), words
print("done")
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.stdout.endswith("done\n"), ended.stderr


@pytest.mark.processes
def test_only_workers_import_what_takes_seconds() -> None:
    """Which Ray Train's controller, each job's own process and each trial would spend before anything else."""
    script = """
import sys
from types import SimpleNamespace
from arplus.training import failure  # all that the controller takes of ours
assert "torch" not in sys.modules
from arplus.config import TrainConfig, VocabularySizes
from arplus.evaluation import evaluate
from arplus.study import ablate, lr_find, tune
from arplus.training import footprint, start, trainer
footprint.run_bytes(TrainConfig(), VocabularySizes())
start.check_start(TrainConfig(), SimpleNamespace(sizes=VocabularySizes(), characters=None, rules=None))
print({"deepspeed", "torch._dynamo"} & set(sys.modules))
"""
    ended = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert ended.stdout == "set()\n", ended.stderr


@pytest.mark.processes
def test_a_dry_run_counts_the_parameters_and_starts_no_ray() -> None:
    ended = job("arplus", "--dry-run", "--seed", "5")
    assert ended.returncode == 0, ended.stderr
    assert "live parameters: 31,142,449\n" in ended.stdout
    assert ended.stdout.endswith("ray job submit --working-dir . -- python jobs/train.py arplus --seed 5\n")
    resolved, _, _ = ended.stdout.partition("\n\n")
    assert json.loads(resolved) == json.loads(json.dumps(to_dict(replace(preset("arplus"), seed=5))))


def test_a_dry_run_of_a_range_test_counts_its_own_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(tmp_path, {"train": [[640]], "valid": [[4]]}).uri
    words = f"jobs/lr_find.py arplus --tiny --data {data} --steps 25 --dry-run".split()
    monkeypatch.setattr(sys, "argv", words)
    runpy.run_path(str(REPOSITORY / words[0]))["main"]()
    said = capsys.readouterr().out
    assert json.loads(said.partition("\n\n")[0])["steps"] == 25
    assert re.search(r"^memory per worker .*^steps: 25 \(", said, re.MULTILINE | re.DOTALL)
    assert said.endswith(f"ray job submit --working-dir . -- python {' '.join(words[:-1])}\n")


@pytest.mark.parametrize(
    ("arguments", "rest"),
    [
        (["arplus", "--dry-run", "--seed", "5"], "arplus --seed 5"),
        (["arplus", "--dry-run", "True", "--run-name", "a b"], "arplus --run-name 'a b'"),
        (["arplus", "--audit", "True", "--dry_run=True"], "arplus --audit True"),
        (["arplus", "--seed", "5"], "arplus --seed 5"),
    ],
)
def test_a_dry_run_says_how_to_submit_the_job(arguments: list[str], rest: str) -> None:
    line = cli.submit_line("jobs/train.py", arguments)
    assert line == f"on a cluster: ray job submit --working-dir . -- python jobs/train.py {rest}"


def test_a_log_ends_with_one_block(capsys: pytest.CaptureFixture[str]) -> None:
    cli.conclude({"checkpoint": "runs/first", "MLflow": None, "next": "python jobs/chat.py"})
    assert capsys.readouterr() == ("", "\ncheckpoint  runs/first\nnext        python jobs/chat.py\n")


def test_after_a_submitted_job_the_next_one_is_to_be_submitted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    cli.conclude({"next": cli.next_job("jobs/tune.py ar", tiny=True, data="a b", mlflow=None, lr_bounds="c")})
    said = capsys.readouterr().err
    assert (
        said == "\nnext  ray job submit --working-dir . -- python jobs/tune.py ar --tiny --data 'a b' --lr-bounds c\n"
    )


def test_a_shell_completes_the_flags_of_a_job_with_presets() -> None:
    """As README.md has it: the words of a line are in COMP_WORDS, and bash calls what `complete` has named."""
    script = f"""
source <({sys.executable} jobs/train.py --tyro-print-completion bash)
COMP_WORDS=(jobs/train.py arplus --optimizer.l) COMP_CWORD=2
$(complete -p jobs/train.py | grep --only-matching '_tyro[^ ]*')
echo "${{COMPREPLY[@]}}"
"""
    ended = subprocess.run(["bash", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == ["--optimizer.lr"], ended.stderr


def test_a_users_error_ends_the_job_with_2_and_one_line() -> None:
    ended = job("arplus", "--dry-run", "--workers", "1:65")
    assert ended.returncode == 2
    assert ended.stdout == ""
    assert ended.stderr.startswith("error: --batch-size: ")
    assert ended.stderr.count("\n") == 1
