"""What a GPU shows of this project, on one page: ``make gpu``, or ``run.py`` with any Python that has what it needs.

The tests that are marked ``gpu``; how fast training and replies are at several batch sizes; and a real job through Ray
Train, with what it waits for its data, and its evaluation. The compiler works while the tests run; what is timed has
the GPU to itself. Every step has a time of its own, none stops the others, and all is on disk as soon as it is known.
``--device cpu --small`` rehearses it where there is no GPU; its figures mean nothing.
"""

import argparse
import contextlib
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
LINE = re.compile(r"step (\d+)/\d+ .*?loss ([\d.]+).*?\| (\d+) examples/s \| data wait ([\d.]+)%(?:.*?MFU ([\d.]+)%)?")
"""A log line of a training job (:mod:`arplus.training.hooks.console`)."""
MACHINE = "import json; from arplus.benchmark import usage; print(json.dumps(usage.describe()))"
TESTS = "tests/gpu tests/kernels tests/test_golden.py tests/evaluation/test_evaluate.py"
STEPS = ("machine", "tests", "train", "generate", "then", "job", "also")


def main() -> int:
    """All of it; 1 where something failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", help="folder of what is found")
    parser.add_argument("--seconds", type=float, default=480, help="after which all is over")
    parser.add_argument("--steps", default=",".join(STEPS), help="which of them to take, with commas")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny networks and batches, for a rehearsal")
    parser.add_argument("--data", type=Path, help="a prepared data set for the job; by default one is made")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 512, 1024, 2048], help="batch sizes")
    parser.add_argument("--processes", type=int, default=4, help="processes of the tests")
    parser.add_argument("--tests", default=TESTS, help="which tests: arguments of pytest")
    parser.add_argument("--then", nargs="*", default=[], help="commands that have the GPU to themselves, too")
    parser.add_argument("--also", nargs="*", default=[], help="more subjects of measure.py, last")
    asked = parser.parse_args()
    if asked.device == "cuda" and not Path("/dev/nvidiactl").exists():
        print("make gpu: skipped, since this machine has no GPU (run.py --device cpu --small rehearses it)")
        return 0
    proof = Proof(asked)
    proof.take(set(asked.steps.split(",")))
    return proof.conclude()


class Proof:
    """The steps, and what they found."""

    def __init__(self, asked: argparse.Namespace) -> None:
        self.asked = asked
        self.output: Path = asked.output.absolute()
        self.output.mkdir(parents=True, exist_ok=True)
        self.work = Path(tempfile.mkdtemp(prefix="arplus-gpu-"))
        self.lines, self.lock = self.output / "speed.jsonl", self.work / "lock"
        self.found: dict[str, dict[str, Any]] = {}
        self.began = time.monotonic()
        self.small = ["--small"] * asked.small
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.variables = os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "PYTHONUNBUFFERED": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "TORCHINDUCTOR_CACHE_DIR": str(self.work / "inductor"),
            "TRITON_CACHE_DIR": str(self.work / "triton"),
            "TORCHINDUCTOR_COMPILE_THREADS": str(max((os.cpu_count() or 1) // 4, 1)),
        }

    def take(self, steps: set[str]) -> None:
        """Takes these steps: what is right first, side by side, and then what is timed."""
        asked, train = self.asked, [f"train:{size}" for size in self.asked.batches]
        if "machine" in steps:
            self.machine()
        with ThreadPoolExecutor(8) as beside, self.lock.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            data = beside.submit(self.data) if "job" in steps else None
            tests = beside.submit(self.tests) if "tests" in steps else None
            compiling = [
                beside.submit(self.measure, f"compile {one}", [one], 400, "--lock", str(self.lock))
                for one in train
                if "train" in steps and "tests" in steps and asked.device == "cuda"
            ]
            if tests is not None:
                tests.result()
            fcntl.flock(lock, fcntl.LOCK_UN)
            for one in compiling:
                one.result()
        if "train" in steps:
            self.measure("train", train, 250)
        if "generate" in steps:
            self.measure("generate", [f"generate:{size}" for size in asked.batches], 120)
        for number, command in enumerate(asked.then if "then" in steps else [], start=1):
            self.run(f"then {number}", 150, shlex.split(command))
        if data is not None:
            self.job(data.result())
        if asked.also and "also" in steps:
            self.measure("also", asked.also, 300)

    # ------------------------------------------------------------------------------------------------------- the steps

    def machine(self) -> None:
        """Which machine it is."""
        said = self.run("machine", 90, [sys.executable, "-c", MACHINE])
        with contextlib.suppress(ValueError, IndexError):
            self.note("machine", json.loads(said.splitlines()[-1]))

    def tests(self) -> None:
        """Whether a GPU computes what it should."""
        command = f"-m pytest -m gpu --device {self.asked.device} -q -p no:cacheprovider -n {self.asked.processes}"
        words = [*shlex.split(command), "--dist", "worksteal", *shlex.split(self.asked.tests)]
        said = self.run("tests", 240, [sys.executable, *words])
        counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", said[-300:])}
        self.note("tests", {**counts, "failures": re.findall(r"^(?:FAILED|ERROR) .*", said, re.MULTILINE)})

    def data(self) -> str:
        """A data set for the job: the one that is given, or one of generated records."""
        if self.asked.data:
            return str(self.asked.data.absolute())
        raw, data = self.work / "raw", self.work / "data"
        records = 2000 if self.asked.small else 20000
        self.job_of("synthesize", 120, f"--records {records} --persona-answers 0.5 --seed 1 --output {raw}")
        self.job_of("prepare", 200, f"--input {raw} --output {data} --valid 0.02 --test 0.02")
        repeat(data, 1 if self.asked.small else 16)
        return str(data)

    def measure(self, name: str, subjects: list[str], limit: float, *more: str) -> None:
        """How fast each subject is; once more where one of them crashed."""
        for _ in range(2):
            words = [sys.executable, str(HERE / "measure.py"), *self.small, *more, str(self.lines), *subjects]
            self.run(name, limit, words)
            if self.found[name].get("exit", 0) in (0, -signal.SIGTERM):  # done, or its time is up
                return

    def job(self, data: str) -> None:
        """A real job through Ray Train, for half a minute of training, and its evaluation."""
        small, device = self.asked.small, "gpu" if self.asked.device == "cuda" else "cpu"
        runs, size = self.work / "runs", 32 if small else 1024
        said = self.job_of(
            "train",
            200,
            f"arplus {'--tiny' if small else ''} --data {data} --storage {runs} --run-name gpu --device {device} "
            f"--batch-size {size} --epochs 1000 --log-every 20 --seed 1",
            stop=30,
        )
        if found := LINE.findall(said):
            _, _, rates, waits, mfu = zip(*found[len(found) // 3 :], strict=True)  # without the first ones
            shares = {"data_wait_percent": median(map(float, waits))}
            shares |= {"mfu_percent": median(map(float, mfu))} if all(mfu) else {}
            losses = [float(found[0][1]), float(found[-1][1])]
            self.note("job train", {"examples_per_second": median(map(float, rates)), **shares, "losses": losses})
        result = self.work / "evaluation.json"
        self.job_of("evaluate", 90, f"--checkpoint {runs / 'gpu'} --data {data} --device {device} --json {result}")
        if result.exists():
            splits = json.loads(result.read_text())["splits"]
            self.note("job evaluate", {f"{name}_ppl": of["standard"]["response_ppl"] for name, of in splits.items()})

    # ------------------------------------------------------------------------------------------------------- processes

    def job_of(self, name: str, limit: float, arguments: str, stop: float | None = None) -> str:
        """Runs ``jobs/NAME.py`` with these arguments."""
        command = [sys.executable, f"jobs/{name}.py", *shlex.split(arguments)]
        return self.run(f"job {name}", limit, command, stop)

    def run(self, name: str, limit: float, command: list[str], stop: float | None = None) -> str:
        """What a command says in at most so many seconds, or so many (``stop``) after its first log line."""
        began, limit = time.monotonic(), min(limit, self.asked.seconds - (time.monotonic() - self.began) - 5)
        if limit < 5:
            self.note(name, {"skipped": "no time was left"})
            return ""
        log = self.work / f"{name.replace(':', '-').replace(' ', '-')}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=self.variables, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
        end = began + limit
        while process.poll() is None and time.monotonic() < end:
            time.sleep(0.2)
            if stop is not None and LINE.search(log.read_text(errors="replace")):
                end, stop = min(end, time.monotonic() + stop), None
        process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        said, seconds = log.read_text(errors="replace"), round(time.monotonic() - began, 1)
        heading = f"===== {name}: exit {process.wait()} after {seconds} s: {shlex.join(command)}"
        with (self.output / "log.txt").open("a") as whole:
            whole.write(f"{heading}\n{said[-99_000:]}\n")
        self.note(name, {"exit": process.returncode, "seconds": seconds})
        return said

    def note(self, name: str, facts: dict[str, Any]) -> None:
        """Adds to what was found, which is on disk at once."""
        self.found.setdefault(name, {}).update(facts)
        print(f"{time.monotonic() - self.began:6.1f} s  {name}  {json.dumps(facts)[:300]}", flush=True)
        lines = self.lines.read_text().splitlines() if self.lines.exists() else []
        speed = {line["subject"]: line for line in map(json.loads, lines)}
        (self.output / "gpu.json").write_text(json.dumps({**self.found, "speed": speed}, indent=1))

    def conclude(self) -> int:
        """The table; 1 where a test or a measurement failed."""
        found = json.loads((self.output / "gpu.json").read_text())
        speed = found.pop("speed")
        print()
        for name, facts in found.items():
            print(f"{name:16}", ", ".join(f"{key} {value}" for key, value in facts.items()))
        print(f"\n{'subject':16} {'per second':>12} {'MFU':>6} {'peak GiB':>9}")
        for name, of in speed.items():
            rate, peak = of.get("examples_per_second") or of.get("replies_per_second"), of.get("peak_memory_bytes")
            figures = f"{rate or 0:12,.0f} {of.get('mfu') or 0:6.1%} {(peak or 0) / 2**30:9.2f}"
            print(f"{name:16}", of.get("error") or (figures if rate else json.dumps(of)[:2000]))
        failed = found.get("tests", {}).get("exit", 0) != 0 or any("error" in of for of in speed.values())
        return int(failed)


def repeat(data: Path, times: int) -> None:
    """Lets a prepared data set name its training files so many times: long epochs from few bytes."""
    path = data / "manifest.json"
    facts = json.loads(path.read_text())
    train = facts["splits"]["train"]
    train |= {key: train[key] * times for key in ("examples", "sessions", "files")}
    path.write_text(json.dumps({**facts, "fingerprint": f"{facts['fingerprint']}x{times}"}))


if __name__ == "__main__":
    sys.exit(main())
