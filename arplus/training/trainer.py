"""One training run as a Ray Train job: workers, engine, feed, tracking and checkpoints put together."""

import json
import logging
import os
import subprocess
import sys
import tempfile
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train import FailureConfig, LoggingConfig, RunConfig
from ray.train.torch import TorchTrainer

from arplus import checkpoint, cluster, storage, tracking
from arplus.checkpoint import Progress, TrainState
from arplus.config import TrainConfig, VocabularySizes, flat, to_dict
from arplus.data.collate import Layout
from arplus.data.dataset import Dataset
from arplus.data.feed import Feed, Order, Place
from arplus.errors import UserError
from arplus.evaluation.replies import sample_replies
from arplus.model.arplus import ARPlus
from arplus.training import preflight
from arplus.training.engine import Engine, NonFiniteLossError
from arplus.training.loop import Hooks, describe, fit, total_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a run is given."""

    config: TrainConfig
    run_uri: str
    tracked: tracking.Run
    progress_bar: bool

    @property
    def record(self) -> Path:
        """The local JSONL record of what is tracked: in the run's folder, a temporary one where that is remote."""
        if storage.is_local(self.run_uri):
            return Path(storage.resolve(self.run_uri)[1]) / "tracking.jsonl"
        return Path(tempfile.gettempdir(), "arplus", f"{self.tracked.run_id}.jsonl")


def train(config: TrainConfig) -> dict[str, Any]:
    """Runs a training job on the connected Ray cluster and returns what ``final_metrics.json`` holds.

    Raises :class:`UserError` for wrong settings or data, :class:`ResourceError` for a cluster that is too small, and
    :class:`NonFiniteLossError` for a run that diverged.
    """
    config = resolved(config)
    dataset = Dataset.open(config.data)
    scaling = preflight.scaling(config)
    run_uri = storage.join(config.storage, config.run_name)
    resumed = _resumed(run_uri, config, dataset)
    tracked = tracking.start_run(
        config.mlflow or tracking.default_uri(config.storage),
        config.experiment,
        config.run_name,
        tags={"preset": config.preset, "fingerprint": dataset.fingerprint, "git_commit": code_version()},
        params=flat(config),
        resume_run_id=resumed.mlflow_run_id if resumed else None,
    )
    storage.write_json(storage.join(run_uri, "config.json"), to_dict(config))
    job = Job(config=config, run_uri=run_uri, tracked=tracked, progress_bar=sys.stderr.isatty())
    tracker = tracking.Tracker(tracked, record=job.record)
    tracker.log_text("config.json", json.dumps(to_dict(config), ensure_ascii=False, indent=2))
    tracker.log_dataset(Path(config.data).name, dataset.fingerprint, config.data, "training")
    filesystem, path = storage.resolve(storage.join(run_uri, "ray"))
    status: tracking.Status = "FAILED"
    try:
        trainer: Any = TorchTrainer(
            cast(Any, _worker),  # its annotation forbids the return value that it documents
            train_loop_config={"job": job},
            scaling_config=scaling,
            # Checkpoints are ours, so Ray's own record of an attempt has a name that no later attempt resumes from.
            run_config=cast(Any, RunConfig)(  # mypy sees the class of Ray Train v1
                name=f"attempt-{uuid4().hex[:8]}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="WARNING"),
            ),
        )
        outcome = trainer.fit().return_value
        if "error" in outcome:
            raise NonFiniteLossError(outcome["error"])
        storage.write_json(storage.join(run_uri, "final_metrics.json"), outcome)
        tracker.log_text("final_metrics.json", json.dumps(outcome, indent=2))
        _log_best(tracker, run_uri, dataset)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
    return outcome


def resolved(config: TrainConfig) -> TrainConfig:
    """The configuration with every name and path filled in, as it is written beside the run."""
    if not config.data:
        raise UserError("--data: is required: the URI of a prepared data set (make one with jobs/prepare.py)")
    return replace(
        config,
        data=storage.absolute(config.data),
        storage=storage.absolute(config.storage),
        run_name=config.run_name or config.preset,
        init_from=config.init_from and storage.absolute(config.init_from),
    )


def feeds(config: TrainConfig, dataset: Dataset, sizes: VocabularySizes, rank: int) -> tuple[Feed, Feed]:
    """The training and the validation feed of one worker."""
    layout = Layout.of(config.model, sizes)

    def feed(split: str, shuffled: bool) -> Feed:
        order = Order(
            split=dataset.split(split),
            batch_size=config.batch_size,
            window_batches=config.feed.window_batches,
            seed=config.seed,
            shuffled=shuffled,
        )
        place = Place(rank=rank, workers=config.workers, accumulation=config.accumulation)
        return Feed(order, layout, place, config.feed)

    return feed("train", True), feed("valid", False)


def code_version() -> str:
    """The commit of the code that runs, "unknown" outside a git checkout."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _log_best(tracker: tracking.Tracker, run_uri: str, dataset: Dataset) -> None:
    """Sample replies of the best checkpoint, and the checkpoint itself, as artifacts of the run."""
    state = checkpoint.load(run_uri)
    tracker.log_text("sample_replies.txt", sample_replies(state, dataset))
    folder = checkpoint.find(run_uri)
    for name in ("weights.safetensors", "config.json", "characters.txt", "persona_words.txt", "state.json"):
        tracker.log_file(storage.resolve(storage.join(folder, name))[1], "checkpoint")


def _resumed(run_uri: str, config: TrainConfig, dataset: Dataset) -> TrainState | None:
    """The newest train state of an existing run of this name. Raises :class:`UserError` if it is not this run's."""
    complete = checkpoint.list_complete(run_uri)
    if not complete:
        return None
    state = checkpoint.load(complete[-1])
    if state.progress.fingerprint != dataset.fingerprint:
        raise UserError(
            f"{run_uri}: this run trained on data of fingerprint {state.progress.fingerprint}, and {config.data} has "
            f"{dataset.fingerprint}; take another --run-name"
        )
    log.info("going on with run %s from step %d", config.run_name, state.progress.step)
    return state


def _worker(arguments: dict[str, Any]) -> dict[str, Any]:
    """What runs in every Ray Train worker. Rank 0's return value is the job's."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr)
    cluster.quiet()
    # DeepSpeed 0.19 calls collectives by names that torch 2.13 renames.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    job: Job = arguments["job"]
    try:
        return _run(job)
    except NonFiniteLossError as error:
        # Every worker is here. Returned, not raised: a retry would come to the same step and the same loss.
        return {"error": str(error)}


def _run(job: Job) -> dict[str, Any]:
    config = job.config
    device = ray.train.torch.get_device()
    context = ray.train.get_context()
    if device.type == "cpu":
        # Ray gives a worker as many threads as logical CPUs; the feed's tasks are light, so take the cores.
        torch.set_num_threads(max((os.cpu_count() or 1) // context.get_local_world_size(), 1))
    dataset = Dataset.open(config.data)
    sizes = dataset.sizes
    train_feed, valid_feed = feeds(config, dataset, sizes, context.get_world_rank())
    state = _newest(job)
    torch.manual_seed(config.seed)
    model = ARPlus(config.model, sizes)
    progress = Progress(fingerprint=dataset.fingerprint)
    if state is not None:
        model.load_weights(state.weights)
        progress = state.progress
    elif config.init_from is not None:
        _initialise(model, config.init_from, sizes)
    engine = Engine(model, config, device)
    if state is not None:
        engine.load_moments(state.moments, progress.step)
        engine.load_schedule(state.schedule)
    hooks = RunHooks(job, engine, dataset, total_steps(config, train_feed))
    try:
        fit(engine, train_feed, valid_feed, progress, config, hooks)
    finally:
        hooks.close()
    return hooks.final(progress)


def _newest(job: Job) -> TrainState | None:
    # Rank 0 looks, so that all workers go on from the same one.
    found = [checkpoint.list_complete(job.run_uri)[-1:] if dist.get_rank() == 0 else []]
    dist.broadcast_object_list(found)
    return checkpoint.load(found[0][0], moments=True) if found[0] else None


def _initialise(model: ARPlus, uri: str, sizes: VocabularySizes) -> None:
    state = checkpoint.load(uri)
    if state.sizes != sizes:
        raise UserError(f"--init-from {uri}: its vocabularies ({state.sizes}) are not those of the data ({sizes})")
    try:
        model.load_weights(state.weights)
    except UserError as error:
        raise UserError(f"--init-from {uri}: {error}") from None


class RunHooks(Hooks):
    """Log lines, tracking and checkpoints of a run. Files and tracking are rank 0's; saving needs all workers."""

    def __init__(self, job: Job, engine: Engine, dataset: Dataset, steps: int) -> None:
        self.job = job
        self.engine = engine
        self.dataset = dataset
        self.steps = steps
        self.validation: dict[str, float] = {}
        self.improved = False
        self.newest: str | None = None
        self.bar = None
        self.tracker = None
        if dist.get_rank() == 0:
            self.tracker = tracking.Tracker(job.tracked, record=job.record)
            if job.progress_bar:
                self.bar = tqdm_ray.tqdm(total=steps, desc=job.config.run_name)

    @property
    def last_checkpoint(self) -> str | None:
        """URI of the newest checkpoint."""
        return self.newest

    def on_log(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Writes the log line and tracks the metrics."""
        if self.tracker is None:
            return
        log.info(describe(progress, metrics, self.steps))
        self.tracker.log(metrics, step=progress.examples)
        if self.bar is not None:
            self.bar.update(progress.step - self.bar.n)

    def on_validation(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Notes the metrics and whether they are the best, and reports them to Ray Train."""
        self.validation = metrics
        best = progress.best_response_ppl
        self.improved = best is None or metrics["response_ppl"] < best
        if self.improved:
            progress.best_response_ppl = metrics["response_ppl"]
        if self.tracker is not None:
            log.info(
                "validation at step %d: response PPL %.3f%s, L_LM %.4f, %d examples",
                progress.step,
                metrics["response_ppl"],
                " (best)" if self.improved else "",
                metrics["auxiliary_loss"],
                metrics["examples"],
            )
            self.tracker.log({f"valid/{k}": v for k, v in metrics.items()}, step=progress.examples)
        ray.train.report({"step": progress.step, "examples": progress.examples, **metrics})

    def checkpoint(self, progress: Progress) -> None:
        """Saves the train state, marks the best and removes what is not to be kept."""
        weights, moments = self.engine.weights(), self.engine.moments()
        if dist.get_rank() == 0:
            state = TrainState(
                config=self.job.config,
                progress=progress,
                schedule=self.engine.schedule_state(),
                characters=self.dataset.characters,
                persona_words=self.dataset.persona_words,
                weights=weights,
                moments=moments,
                mlflow_run_id=self.job.tracked.run_id,
            )
            self.newest = checkpoint.save(self.job.run_uri, state)
            if self.improved and progress.best_response_ppl is not None:
                checkpoint.mark_best(self.job.run_uri, self.newest, progress.best_response_ppl)
            checkpoint.retain(self.job.run_uri, self.job.config.keep_checkpoints)
        self.improved = False
        dist.barrier()

    def final(self, progress: Progress) -> dict[str, Any]:
        """What a finished run leaves in ``final_metrics.json``."""
        return {
            "run_name": self.job.config.run_name,
            "preset": self.job.config.preset,
            "fingerprint": progress.fingerprint,
            "steps": progress.step,
            "examples": progress.examples,
            "best_response_ppl": progress.best_response_ppl,
            "mlflow_run_id": self.job.tracked.run_id,
            **{f"valid/{k}": v for k, v in self.validation.items()},
        }

    def close(self) -> None:
        """Sends what waits; the driver ends the MLflow run itself."""
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.close()
