"""A study on storage, which is all that it needs to go on after its driver died.

A study's folder holds::

    study.json              its kind, settings, data fingerprint, MLflow run, and the job that it belongs to
    trials/NAME.json        one record a run, written before the run starts
    runs/NAME/              the run's own folder (:mod:`arplus.runs.checkpoint`)

Nothing of Ray Tune's own state is read again: it is pickled code, up to ten seconds old, and knows nothing of runs that
were begun since.
"""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar
from uuid import uuid4

from arplus import storage, tracking
from arplus.cluster import node
from arplus.config import (
    Role,
    StudyConfig,
    TrainConfig,
    flat,
    from_dict,
    names_of_role,
    to_dict,
    validate,
    with_values,
)
from arplus.errors import UsageError
from arplus.runs import attempt, resume
from arplus.runs.attempt import SupersededError
from arplus.training.trainer import resolve

C = TypeVar("C", bound=StudyConfig)
Outcome = Literal["running", "finished", "stopped", "diverged", "failed"]
"""``running`` is all that has not ended, so also what a killed driver left; ``stopped`` ended early, by ASHA."""
OBJECTIVE = "best_response_ppl"
"""What runs are compared by: their lowest response perplexity on validation. Never the total loss, whose scale moves
with λ1."""


@dataclass(kw_only=True)
class Trial:
    """The record of one run of a study."""

    name: str
    """Name of the run, unique within the study."""
    values: dict[str, Any]
    """What sets it apart from the study's other runs, by dotted name."""
    config: dict[str, Any]
    """Its settings."""
    outcome: Outcome = "running"
    problem: str = ""
    """Why it diverged or failed."""
    results: list[dict[str, float]] = field(default_factory=list)
    """One entry a validation: ``examples``, ``response_ppl`` and the lowest so far."""
    final: dict[str, Any] = field(default_factory=dict)
    """What a finished run leaves in ``final_metrics.json``."""
    mlflow_run_id: str | None = None

    @property
    def ended(self) -> bool:
        """Whether it need not be run again. What failed is tried again when the study goes on."""
        return self.outcome in ("finished", "stopped", "diverged")

    @property
    def score(self) -> float | None:
        """Its lowest response perplexity; None where it has none, or diverged."""
        return self.results[-1][OBJECTIVE] if self.results and self.outcome != "diverged" else None

    @property
    def settings(self) -> TrainConfig:
        """Its settings, checked."""
        return from_dict(TrainConfig, self.config, source=self.name)


@dataclass(kw_only=True)
class Study:
    """A study that this process runs."""

    uri: str
    kind: str
    config: StudyConfig
    fingerprint: str
    """Of the data."""
    tracked: tracking.RunRef
    """The study's own MLflow run, parent of its runs'."""
    trials: dict[str, Trial]
    """All records, by name, in the order in which they were made."""
    owner: str
    """This job, as ``study.json`` names it until another one goes on with the study."""

    @classmethod
    def begin(cls, config: StudyConfig, *, kind: str, fingerprint: str) -> "Study":
        """Begins the study of ``config``, whose names are filled in, or goes on with it.

        Raises :class:`UsageError` where the name is taken: by a run, by a study of other settings (which are listed) or
        other data, or by any study where --resume is never.
        """
        run = config.run
        uri = storage.join(run.storage, run.run_name)
        file = storage.join(uri, "study.json")
        before = storage.with_retries(file, lambda: _compatible(file, config, kind, fingerprint))
        if before is None and storage.with_retries(uri, lambda: storage.exists(storage.join(uri, "config.json"))):
            raise UsageError(f"--run-name {run.run_name}: {uri} is a training run; take another name")
        tracked = tracking.start_run(
            run.mlflow or tracking.default_uri(run.storage),
            run.experiment,
            run.run_name,
            tags={"kind": kind, "preset": run.preset, "fingerprint": fingerprint} | node.code_tags(),
            params=flat(config),
            resume_run_id=before["mlflow_run_id"] if before else None,
        )
        study = cls(
            uri=uri,
            kind=kind,
            config=config,
            fingerprint=fingerprint,
            tracked=tracked,
            trials={},
            owner=uuid4().hex,
        )
        facts = {"kind": kind, "fingerprint": fingerprint, "mlflow_run_id": tracked.run_id, "owner": study.owner}
        storage.with_retries(file, lambda: storage.write_json(file, facts | {"config": to_dict(config)}))
        study.trials = {trial.name: trial for trial in storage.with_retries(uri, lambda: _records(uri))}
        return study

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.run.run_name

    @property
    def record(self) -> Path:
        """The local record of what is tracked on the study itself."""
        return tracking.record_of(self.tracked, self.uri)

    @property
    def records(self) -> str | None:
        """Where a record that MLflow lacks a part of is kept, for a study whose folder is remote."""
        return tracking.keep_of(self.uri)

    @property
    def best(self) -> Trial | None:
        """The run with the lowest response perplexity among those that finished or were stopped early."""
        scored = [t for t in self.trials.values() if t.outcome in ("finished", "stopped") and t.score is not None]
        return min(scored, key=lambda t: t.score or 0.0, default=None)

    def add(self, name: str, values: dict[str, Any], config: TrainConfig) -> Trial:
        """Makes the record of a new run in the study's folder, which is durable before anything starts."""
        config = replace(config, run_name=name, storage=self.runs_uri)
        trial = Trial(name=name, values=values, config=to_dict(config))
        self.trials[name] = trial
        self.save(trial)
        return trial

    def renew(self, trial: Trial) -> None:
        """Gives a run that is to go on the study's settings of today, where it may differ from those it began with."""
        today = flat(self.config.run)
        changed = {name: today[name] for name in names_of_role(TrainConfig, Role.OPERATION)}
        own = {"run_name": trial.name, "storage": self.runs_uri}
        trial.config = to_dict(with_values(trial.settings, changed | own, source=trial.name))

    def save(self, trial: Trial) -> None:
        """Writes a record. Raises :class:`SupersededError` where another job has taken the study over."""
        self.check_owner()
        uri = self.record_uri(trial.name)
        storage.with_retries(uri, lambda: storage.write_json(uri, asdict(trial)))

    def write(self, name: str, text: str) -> None:
        """Writes a file into the study's folder."""
        uri = storage.join(self.uri, name)
        storage.with_retries(uri, lambda: storage.write_bytes(uri, text.encode()))

    def check_owner(self) -> None:
        """Raises :class:`SupersededError` where another job has taken the study over, and with it all runs."""
        file = storage.join(self.uri, "study.json")
        if storage.with_retries(file, lambda: storage.read_json(file))["owner"] != self.owner:
            raise SupersededError(f"{self.uri}: another job has taken this study over; this one stops")

    def record_uri(self, name: str) -> str:
        """Where a record is."""
        return storage.join(self.uri, "trials", f"{name}.json")

    @property
    def runs_uri(self) -> str:
        """The storage of its runs."""
        return storage.join(self.uri, "runs")

    def run_uri(self, name: str) -> str:
        """A run's folder."""
        return storage.join(self.runs_uri, name)

    def tracked_run(self, trial: Trial) -> tracking.RunRef | None:
        """A run's MLflow run; None where it has not got as far."""
        if trial.mlflow_run_id is None:
            uri = self.run_uri(trial.name)
            if (owner := storage.with_retries(uri, lambda: attempt.read(uri))) is not None:
                trial.mlflow_run_id = owner.mlflow_run_id
        return self.tracked._replace(run_id=trial.mlflow_run_id) if trial.mlflow_run_id else None


def _records(uri: str) -> list[Trial]:
    """The records of a study, in the order of their names."""
    folder = storage.join(uri, "trials")
    files = storage.list_files(folder) if storage.exists(folder) else []
    # A killed process may have left a file half-written.
    return [Trial(**storage.read_json(file)) for file in files if file.endswith(".json")]


def _compatible(file: str, config: StudyConfig, kind: str, fingerprint: str) -> dict[str, Any] | None:
    """What ``study.json`` holds, where ``config`` may go on with it; None where there is none yet."""
    before: dict[str, Any] | None = storage.find_json(file)
    if before is None:
        return None
    other = "take another --run-name"
    if config.run.resume == "never":
        raise UsageError(f"--resume never: {file} exists; {other}, or --resume auto to go on with it")
    if before["kind"] != kind:
        raise UsageError(f"--run-name {config.run.run_name}: {file} is of a study of kind {before['kind']}; {other}")
    if before["fingerprint"] != fingerprint:
        raise UsageError(
            f"{file}: this study is on data of fingerprint {before['fingerprint']}, and {config.run.data} has "
            f"{fingerprint}; {other}"
        )
    theirs = from_dict(type(config), before["config"], source=file)
    if different := resume.differences(theirs, config, names_of_role(type(config), Role.OPERATION)):
        raise UsageError(f"{file}: this study has other settings ({'; '.join(different)}); {other}")
    return before


def resolve_study(config: C, kind: str) -> C:
    """The settings of a study of this kind with every name and path filled in."""
    run = validate(config).run
    name = run.run_name or f"{kind}-{run.preset}"
    run = resolve(replace(run, run_name=name, experiment=run.experiment or name))
    return replace(config, run=replace(run, mlflow=run.mlflow or tracking.default_uri(run.storage)))
