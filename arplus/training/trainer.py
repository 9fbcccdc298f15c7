"""One training run as a Ray Train job: workers, engine, feed, tracking and checkpoints put together."""

import logging
import os
import sys
from dataclasses import asdict, dataclass, replace
from typing import Any
from uuid import uuid4

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.experimental import tqdm_ray
from ray.train import FailureConfig, RunConfig
from ray.train.torch import TorchTrainer

from arplus import storage, tracking
from arplus.config import TrainConfig, VocabularySizes, to_dict
from arplus.data.collate import Layout
from arplus.data.dataset import Dataset
from arplus.data.feed import Feed, Order, Place
from arplus.errors import UserError
from arplus.model.arplus import ARPlus
from arplus.training import checkpoint, preflight
from arplus.training.checkpoint import Progress, TrainState
from arplus.training.engine import Engine, NonFiniteLossError
from arplus.training.loop import Hooks, describe, fit, total_steps

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What every worker of a run is given."""

    config: TrainConfig
    run_uri: str
    mlflow_uri: str
    mlflow_run_id: str
    progress_bar: bool


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
    mlflow_uri = config.mlflow or tracking.default_uri(config.storage)
    tracker = tracking.start_run(
        mlflow_uri,
        config.experiment,
        config.run_name,
        tags={"preset": config.preset, "fingerprint": dataset.fingerprint, **tracking.git_tags()},
        params=to_dict(config),
        resume_run_id=resumed.mlflow_run_id if resumed else None,
    )
    storage.write_json(storage.join(run_uri, "config.json"), to_dict(config))
    job = Job(
        config=config,
        run_uri=run_uri,
        mlflow_uri=mlflow_uri,
        mlflow_run_id=tracker.run_id,
        progress_bar=sys.stderr.isatty(),
    )
    filesystem, path = storage.resolve(storage.join(run_uri, "ray"))
    status = "FAILED"
    try:
        result = TorchTrainer(
            _worker,
            train_loop_config=asdict(job) | {"config": config},
            scaling_config=scaling,
            # Checkpoints are ours, so Ray's own record of an attempt has a name that no later attempt resumes from.
            run_config=RunConfig(
                name=f"attempt-{uuid4().hex[:8]}",
                storage_path=path,
                storage_filesystem=filesystem,
                failure_config=FailureConfig(max_failures=0),
            ),
        ).fit()
        outcome = result.return_value
        if "error" in outcome:
            raise NonFiniteLossError(outcome["error"])
        storage.write_json(storage.join(run_uri, "final_metrics.json"), outcome)
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
    layout = Layout(
        sizes=sizes,
        persona_words=config.model.memory_hops > 0,
        infilling=config.model.auxiliary == "infilling",
    )

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
    job = Job(**arguments)
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
    sizes = VocabularySizes(characters=dataset.characters.size, persona_words=dataset.persona_words.size)
    train_feed, valid_feed = feeds(config, dataset, sizes, context.get_world_rank())
    state = _newest(job)
    torch.manual_seed(config.seed)
    model = ARPlus(config.model, sizes)
    progress = Progress(fingerprint=dataset.fingerprint)
    if state is not None:
        model.load_state_dict(state.weights)
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
        model.load_state_dict(state.weights)
    except RuntimeError as error:
        raise UserError(f"--init-from {uri}: another model than --model says: {error}") from None


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
            self.tracker = tracking.attach(job.mlflow_uri, job.mlflow_run_id)
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
                mlflow_run_id=self.job.mlflow_run_id,
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
            "mlflow_run_id": self.job.mlflow_run_id,
            **{f"valid/{k}": v for k, v in self.validation.items()},
        }

    def close(self) -> None:
        """Flushes what is tracked; the driver closes the MLflow run itself."""
        if self.bar is not None:
            self.bar.close()
        if self.tracker is not None:
            self.tracker.flush()
