"""What a run tells MLflow and Ray Train."""

import logging
import shutil
import threading

import ray.train

from arplus import tracking
from arplus.data.loader import Step
from arplus.runs.checkpoint import TrainProgress
from arplus.training.hooks import profiler
from arplus.training.hooks.base import Hook

log = logging.getLogger(__name__)


class Mlflow(Hook):
    """Tracks metrics; rank 0's, and after all hooks that track something of their own."""

    def __init__(self, tracker: tracking.Tracker) -> None:
        self.tracker = tracker

    def on_log(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Tracks the means since the last time."""
        self.tracker.log(metrics, step=progress.examples)

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Tracks what the validation found."""
        self.tracker.log({f"valid/{name}": value for name, value in metrics.items()}, step=progress.examples)

    def after_checkpoint(self, progress: TrainProgress, seconds: float) -> None:
        """Tracks how long training stood still."""
        self.tracker.log({"perf/checkpoint_seconds": seconds}, step=progress.examples)

    def close(self) -> None:
        """Sends what waits; the driver ends the MLflow run itself, but perhaps on another node than this one."""
        if self.tracker.close() == 0:
            shutil.rmtree(profiler.copies(self.tracker), ignore_errors=True)


class RayReports(Hook):
    """Reports validations to Ray Train, which a study follows; every worker's, since a report is a barrier."""

    def on_validation(self, progress: TrainProgress, metrics: dict[str, float]) -> None:
        """Reports."""
        ray.train.report({**metrics, "step": progress.step, "examples": progress.examples})


class SystemMetrics(Hook):
    """Utilisation of rank 0's machine and its GPUs as MLflow's own system metrics; rank 0's.

    MLflow's monitor asks the server after every sample, and ends where it does not answer. This one samples with the
    same parts of MLflow, and what it finds goes the way of all metrics. They stand at the examples trained on.
    """

    def __init__(self, tracker: tracking.Tracker) -> None:
        self.tracker = tracker
        self.examples = 0
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="system metrics", daemon=True)
        self.thread.start()

    def after_step(self, progress: TrainProgress, step: Step) -> None:
        """Notes how far training is."""
        self.examples = progress.examples

    def close(self) -> None:
        """Tracks what was sampled since the last time."""
        self.closed.set()
        self.thread.join(timeout=10)

    def _follow(self) -> None:
        try:
            monitor = tracking.SystemMonitor()
            while not self.closed.is_set():
                for _ in range(monitor.samples):
                    ended = self.closed.wait(monitor.seconds)
                    monitor.sample()
                    if ended:
                        break
                self.tracker.log(monitor.means(), step=self.examples)
        except Exception as error:  # a driver or a container that hides its figures does not end the training
            log.warning("no more system metrics: %s", error)
