"""The full data set's size, from one gzip on a real S3 server to the committed manifest."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from arplus import storage

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]

ROOT = Path(__file__).parent.parent.parent
RECORDS, DUPLICATES, SESSIONS = 5_438_165, 243_016, 5_195_149


class Usage:
    """CPU seconds of a process and all that it starts, and the peak of their memory (PSS: shared pages once)."""

    def __init__(self, pid: int):
        self._process = psutil.Process(pid)
        self._cpu: dict[tuple[int, float], float] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.peak_bytes = 0
        self._thread.start()

    @property
    def cpu_seconds(self) -> float:
        return sum(self._cpu.values())

    def end(self) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        rounds = 0
        while not self._over.wait(0.25):
            memory = 0
            try:
                processes = [self._process, *self._process.children(recursive=True)]
            except psutil.Error:
                return
            for process in processes:
                try:
                    times = process.cpu_times()
                    self._cpu[process.pid, process.create_time()] = times.user + times.system
                    memory += process.memory_full_info().pss if rounds % 12 == 0 else 0
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, memory)
            rounds += 1


def run(*command: Any) -> Usage:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    job = subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment)
    usage = Usage(job.pid)
    assert job.wait() == 0
    usage.end()
    return usage


def test_exactly_the_sessions_that_were_planted(s3_server: Any) -> None:
    source, output = s3_server.uri("full/dialogues_train.jsonl.gz"), s3_server.uri("full/prepared")
    run("jobs/synthesize.py", "--records", RECORDS, "--duplicates", DUPLICATES, "--output", source)
    began = time.monotonic()
    usage = run("jobs/prepare.py", "--input", source, "--output", output)
    seconds = time.monotonic() - began
    figures = {
        "input_bytes": storage.size(source),
        "seconds": round(seconds, 1),
        "records_a_second": round(RECORDS / seconds),
        "cpu_seconds_a_million": round(usage.cpu_seconds / RECORDS * 1e6, 1),
        "peak_gib": round(usage.peak_bytes / 2**30, 2),
    }
    print(json.dumps(figures))  # noqa: T201
    manifest = storage.read_json(storage.join(output, "manifest.json"))
    assert manifest["records"] == RECORDS
    assert manifest["rejected"] == {}
    assert manifest["duplicates"]["dialogue_and_profiles"] == DUPLICATES
    assert manifest["sessions"] == SESSIONS == sum(split["sessions"] for split in manifest["splits"].values())
    assert usage.peak_bytes < 5e9
