"""All runs of a study through Ray Tune: what is unfinished first, then what its source says, side by side."""

import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

from ray import tune
from ray.tune.experiment import Trial as TuneTrial
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from arplus import storage, tracking
from arplus.cluster import job, ray_private
from arplus.config import to_dict
from arplus.errors import ArplusError, RunError
from arplus.runs import attempt
from arplus.runs.attempt import StoppedError, SupersededError
from arplus.study.record import OBJECTIVE, Study, Trial
from arplus.study.slots import Slots
from arplus.study.trial import RESOURCES, TrialProcess

log = logging.getLogger(__name__)

IN_A_ROW = 3
"""Failed runs, none in between, after which a study ends: what they fail of is not theirs."""
PROGRESS_S = 30.0
"""Seconds between two words on a study's progress at least, unless a run has ended."""


class Source(ABC):
    """Where a study's runs come from."""

    @abstractmethod
    def next(self) -> Trial | None:
        """The record of a new run, made with :meth:`Study.add`; None where there is none any more."""

    def tell(self, trial: Trial) -> None:
        """Says that a run ended; a source that learns nothing from it leaves this out."""
        return None

    @abstractmethod
    def progress(self) -> str:
        """How far the study is, for the log."""


def execute(
    study: Study,
    source: Source,
    slots: Slots,
    tracker: tracking.Tracker,
    *,
    again: list[Trial],
    scheduler: TrialScheduler | None = None,
) -> None:
    """Runs what is to go on ``again``, unfinished or failed, and all that ``source`` gives, and keeps the records.

    A trial's own process that dies is started again, from the run's newest checkpoint, ``--max-failures`` times;
    whatever else ends a run is in its record, and the others go on. Raises :class:`StoppedError` where this process was
    told to end, with every run saved; ``tracker`` is told at once. Raises :class:`RunError` where :data:`IN_A_ROW` runs
    failed, none in between.
    """
    adapter = _Adapter(study, source, slots, again, scheduler)
    set_environment()
    filesystem, path = storage.resolve_lasting(study.folder.ray)
    tuner = tune.Tuner(
        tune.with_resources(TrialProcess, RESOURCES),
        tune_config=tune.TuneConfig(
            search_alg=adapter,
            scheduler=scheduler,
            num_samples=-1,  # until the searcher ends
            max_concurrent_trials=slots.side_by_side,
            trial_dirname_creator=_name_of,
            trial_name_creator=_name_of,
        ),
        run_config=cast(Any, tune.RunConfig)(
            name=f"job-{uuid4().hex[:8]}",  # of no later use; see arplus.study.record
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=tune.FailureConfig(max_failures=study.config.run.max_failures),
            checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),  # runs save themselves
            verbose=0,
        ),
    )

    def stop() -> None:
        tracker.mark("KILLED")
        adapter.stop()

    with attempt.on_stop_signal(stop):
        tuner.fit()
    if adapter.error is not None:
        raise adapter.error
    storage.with_retries(study.folder.ray, storage.delete, study.folder.ray)
    if len(adapter.failures) >= IN_A_ROW:
        raise RunError(
            f"study {study.name}: {IN_A_ROW} runs in a row failed; of the last one: {adapter.failures[-1]}; "
            "the same command tries them again"
        )
    if adapter.stopping or adapter.live:
        raise StoppedError(f"study {study.name}: stopped; the same command goes on with it")


def asha(budget: int, validations: int, reduction: float, known: Iterable[Trial] = ()) -> ASHAScheduler | None:
    """ASHA over the examples trained on, which knows the validations of the ``known`` trials.

    The first rung is the first validation; each further one is ``reduction`` times as far. None where there is but one
    validation, at the end.
    """
    if validations < 2:
        return None
    scheduler = ASHAScheduler(
        time_attr="examples",
        metric=OBJECTIVE,
        mode="min",
        # A little early: an epoch whose last batch is short must not move a rung to the next validation.
        grace_period=cast(Any, 0.9 * budget / validations),
        max_t=cast(Any, budget * (validations - 1) / validations),
        reduction_factor=reduction,
        stop_last_trials=False,  # the run ends by itself, with its last checkpoint and final metrics
    )
    for trial in known:
        replay(scheduler, trial.name, trial.results)
    return scheduler


def replay(scheduler: TrialScheduler, trial_id: str, results: list[dict[str, float]]) -> None:
    """Tells a scheduler of a trial's validations so far; a rung that knows a trial takes no later value of it."""
    past = TuneTrial("", trial_id=trial_id, stub=True)
    scheduler.on_trial_add(cast(Any, None), past)
    for result in results:
        scheduler.on_trial_result(cast(Any, None), past, cast(Any, result))


def _name_of(trial: TuneTrial) -> str:
    return Path(trial.config["record"]).stem


class _Adapter(Searcher):
    """The study as Ray Tune's searcher, which learns of all that happens before Tune acts on it."""

    def __init__(
        self,
        study: Study,
        source: Source,
        slots: Slots,
        again: list[Trial],
        scheduler: TrialScheduler | None,
    ) -> None:
        super().__init__()
        self.study = study
        self.tags = job.tags(study.config.run.tag)
        self.source = source
        self.slots = slots
        self.scheduler = scheduler
        self.again = list(again)
        self.live: dict[str, Trial] = {}
        """Records of the trials that run, by Tune's id."""
        self.stopping = False
        self.ended, self.told_at = -1, 0.0
        self.failures: list[str] = []
        """Why the last runs failed; empty once one has not."""
        self.error: Exception | None = None
        """What kept a record from being written, as where another job has taken the study over."""

    def suggest(self, trial_id: str) -> Any:
        """The next run, written down before it starts; none any more where that fails, which ends the study."""
        with self._ending_the_study():
            return self._start_next(trial_id)
        return Searcher.FINISHED

    def _start_next(self, trial_id: str) -> Any:
        trial = None
        if not self.stopping and len(self.failures) < IN_A_ROW:
            if self.again:
                self.study.renew(trial := self.again.pop(0))
            else:
                trial = self.source.next()
        if trial is None:
            return Searcher.FINISHED
        trial.outcome, trial.problem = "running", ""
        self._save(trial)
        if self.scheduler is not None:
            replay(self.scheduler, trial_id, trial.results)
        self.live[trial_id] = trial
        return {
            "record": self.study.folder.trial(trial.name).uri,
            "study": self.study.name,
            "parent_run_id": self.study.tracked.run_id,
            "tags": self.tags,
            **self.slots._asdict(),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Notes a validation."""
        with self._ending_the_study():
            self._note(self.live[trial_id], result)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Notes how a run ended; Tune ends its process after this."""
        with self._ending_the_study():
            self._complete(self.live.pop(trial_id), result, error)

    @contextmanager
    def _ending_the_study(self) -> Iterator[None]:
        """Keeps an error for the study's end, which it brings about: Tune would start a run that has ended again."""
        try:
            yield
        except Exception as error:
            if self.error is None:
                self.error, self.stopping = error, True
                threading.Thread(target=self.stop, name="stop-study", daemon=True).start()

    def _complete(self, trial: Trial, result: dict[str, Any] | None, error: bool) -> None:
        leader = self.study.best
        self.study.tracked_run(trial)
        if error or result is None:
            trial.outcome, trial.problem = "failed", "its process ended again and again; the log says why"
        else:
            told = result.get("outcome", "running")
            if told == "running" and self.stopping:  # the run was saved and goes on another time
                self.study.save(trial)
                return
            # A run that Tune ends in mid-way is one that ASHA has stopped.
            trial.outcome = "stopped" if told == "running" else told
            trial.problem = result.get("problem", "")
            if trial.outcome == "finished":
                trial.final = self.study.folder.run(trial.name).final.read()
        if len(self.failures) < IN_A_ROW:  # from then on Tune starts no run, whatever still ends well
            self.failures = [*self.failures, trial.problem] if trial.outcome == "failed" else []
        if trial.outcome in ("diverged", "failed"):
            log.warning("%s %s: %s", trial.name, trial.outcome, trial.problem)
        self._note(trial, result or {})
        if trial.ended:
            self._keep_best_weights(trial, leader)
        self.source.tell(trial)

    def stop(self) -> None:
        """Has every run save and end; starts no further one."""
        self.stopping = True
        while self.live:
            for trial in list(self.live.values()):
                run = self.study.folder.run(trial.name).uri
                try:
                    self.study.check_owner()
                    if (owner := attempt.read(run)) is not None and not owner.stop:
                        attempt.request_stop(run, owner)
                except (ArplusError, OSError) as error:  # another job's now, or the storage is away
                    log.debug("%s", error)
            time.sleep(0.5)

    def save(self, checkpoint_path: str) -> None:
        """Nothing: the records say all."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing; see :meth:`save`."""

    def __reduce__(self) -> Any:
        return Searcher, ()  # Tune pickles itself, to be restored from; nobody does

    def _note(self, trial: Trial, result: dict[str, Any]) -> None:
        known = trial.results[-1]["examples"] if trial.results else 0
        if trial.outcome != "diverged" and result.get("examples", 0) > known and "response_ppl" in result:
            trial.results.append({key: result[key] for key in ("examples", "response_ppl", OBJECTIVE)})
        self._save(trial)

    def _keep_best_weights(self, trial: Trial, leader: Trial | None) -> None:
        """Leaves one that has ended, and is not the best so far, its best weights: ASHA lets none of them go on.

        Its own process does so to one that ends now, as it saves once more after this; one that was the best so far
        has no process by now, or if ASHA has stopped it, may have; that one waits for the study's end.
        """
        other = leader if self.study.best is trial else trial
        if other is None or self.study.config.run.keep_checkpoints == "all":
            return
        other.kept = "best"
        self.study.save(other)
        if other is not trial and other.outcome == "finished":
            self.study.folder.run(other.name).checkpoints.keep_best_weights()

    def _save(self, trial: Trial) -> None:
        self.study.save(trial)
        ended = sum(t.outcome != "running" for t in self.study.trials.values())
        if ended != self.ended or time.monotonic() - self.told_at >= PROGRESS_S:
            self.ended, self.told_at = ended, time.monotonic()
            log.info("%s", self.source.progress())


@contextmanager
def study_session(study: Study) -> Iterator[tracking.Tracker]:
    """Tracks on the study itself, and ends its MLflow run and those of its runs as the block ends."""
    tracker = tracking.Tracker.beside(study.tracked, study.uri)
    tracker.log_text("study.json", storage.as_json(to_dict(study.config)))
    data = study.config.run.data
    tracker.log_dataset(Path(data).name, study.facts.fingerprint, data, study.facts.kind)
    status: tracking.Status | None = "FAILED"
    try:
        yield tracker
        status = "FINISHED"
    except (KeyboardInterrupt, SystemExit, StoppedError):  # Ray makes a SystemExit of `ray job stop`
        status = "KILLED"
        raise
    except SupersededError:
        status = None  # all runs are the other job's now
        raise
    except Exception as error:
        tracker.note_failure(error)
        raise
    finally:
        if status is not None:
            end_runs(study)
        tracker.close(status)


def end_runs(study: Study) -> None:
    """Ends the MLflow runs that nobody would end any more, and tags those that came to nothing with the reason."""
    try:
        for trial in study.trials.values():
            run = study.tracked_run(trial)
            if run is not None and trial.outcome in ("diverged", "failed"):
                tracking.end_run(run, "FAILED", {"outcome": f"{trial.outcome}: {trial.problem}"})
        tracking.end_children(study.tracked)
    except ArplusError as error:  # whatever brought the study to its end is to be heard, not this
        log.warning("MLflow may show runs as RUNNING until the same command is started again: %s", error)


def check_outcome(study: Study) -> None:
    """Raises :class:`RunError` where no run of the study came to a result."""
    if study.best is None:
        problems = [f"{t.name}: {t.problem}" for t in study.trials.values() if t.problem]
        raise RunError(f"study {study.name}: no run has a result ({'; '.join(problems[:3]) or 'there was none'})")


def set_environment() -> None:
    """Ray Tune's own files, banner and Ctrl-C off, by the environment alone; AWS's keys stay where they are."""
    ray_private.keep_keys_out_of_trials()
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it gives the runs ten seconds to end
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its banner and end ignore verbose=0
