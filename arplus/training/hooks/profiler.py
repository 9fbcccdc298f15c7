"""A profile of some steps (``--profile-steps``): where their time goes, and on a GPU their memory."""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from arplus import storage, torch_private, tracking
from arplus.data.loader import Step
from arplus.runs.checkpoint import TrainProgress
from arplus.training.hooks.base import Hook

log = logging.getLogger(__name__)

FOLDER = "profile"
"""Folder of profiles, in the run's and among its artifacts."""
OPERATIONS = 40
"""Rows of the table."""
ALLOCATIONS = 1_000_000
"""Allocations that a memory snapshot remembers."""


def copies(tracker: tracking.Tracker) -> Path:
    """Where the files of a remote run lie until storage and MLflow have them."""
    return tracker.record.with_suffix("") / FOLDER


class Profiler(Hook):
    """Profiles rank 0, which has it alone; a profile that fails costs the run nothing but a warning.

    Beside the run and in MLflow it leaves a trace for Perfetto or chrome://tracing and a table of the dearest
    operations; on a GPU also a memory snapshot for pytorch.org/memory_viz, with every allocation of these steps and so
    with their peak.
    """

    def __init__(self, steps: range, run_uri: str, tracker: tracking.Tracker) -> None:
        """``steps`` are counted from 1, as in the log line."""
        self.steps = steps
        self.run_uri = run_uri
        self.tracker = tracker
        self.on_gpu = torch.cuda.is_available()
        self.profile: profile | None = None
        self.writing: threading.Thread | None = None
        here = Path(storage.resolve(run_uri)[1], FOLDER) if storage.is_local(run_uri) else copies(tracker)
        self.stem = here / f"steps-{steps[0]}-{steps[-1]}"

    def before_step(self, progress: TrainProgress) -> None:
        """Starts in the first of the steps that this start of the workers makes."""
        if self.writing is None and self.profile is None and progress.step + 1 in self.steps:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.on_gpu else [])]
            self.profile = profile(activities=activities)
            with self._only_warned_of():
                if self.on_gpu:
                    torch_private.record_allocations(ALLOCATIONS)
                self.profile.start()

    def after_step(self, progress: TrainProgress, step: Step) -> None:
        """Ends after the last one."""
        if progress.step + 1 == self.steps[-1]:
            self._stop()

    def close(self) -> None:
        """Ends a profile of steps that the run did not come to, and waits for the files."""
        self._stop()
        if self.writing is not None:
            self.writing.join(timeout=60)

    def _stop(self) -> None:
        if self.profile is None:
            return
        done, self.profile = self.profile, None
        with self._only_warned_of():
            done.stop()
        self.writing = threading.Thread(target=self._write, args=(done,), name="profile", daemon=True)
        self.writing.start()

    def _write(self, done: profile) -> None:
        """In the background, since a trace may have millions of events and storage may be away."""
        with self._only_warned_of():
            self.stem.parent.mkdir(parents=True, exist_ok=True)
            if self.on_gpu:
                torch_private.dump_allocations(f"{self.stem}.memory.pickle")
            done.export_chrome_trace(f"{self.stem}.trace.json.gz")
            order = f"self_{'cuda' if self.on_gpu else 'cpu'}_time_total"
            table = done.key_averages().table(sort_by=order, row_limit=OPERATIONS, max_name_column_width=80)
            Path(f"{self.stem}.txt").write_text(table, encoding="utf-8")
            for path in sorted(self.stem.parent.glob(f"{self.stem.name}.*")):
                if not storage.is_local(self.run_uri):
                    there, content = storage.join(self.run_uri, FOLDER, path.name), path.read_bytes()
                    storage.with_retries(there, storage.write_bytes, there, content)
                self.tracker.log_file(path, FOLDER)

    @contextmanager
    def _only_warned_of(self) -> Iterator[None]:
        """Whatever the profiler or a disk may do, training goes on."""
        try:
            yield
        except Exception as error:
            log.warning("--profile-steps: no profile of %s: %s", self.stem.name, error)
