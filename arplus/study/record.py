"""A study on storage, which is all that it needs to go on after its driver died.

A study's folder holds::

    study.json              its kind, settings, data fingerprint, MLflow run, and the job that it belongs to
    trials/NAME.json        one record per run, written before the run starts
    runs/NAME/              the run's own folder (:mod:`arplus.runs.folder`)

The study belongs to the newest job, as a run does (:mod:`arplus.runs.attempt`).

Nothing of Ray Tune's own state is read again: it is pickled code, up to ten seconds old, and knows nothing of runs that
were begun since.
"""

from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, TypeVar
from uuid import uuid4

from arplus import storage, tracking
from arplus.cluster import job
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
from arplus.config.settings import FREE_TEXT
from arplus.documents import Document
from arplus.errors import UsageError
from arplus.runs import resume
from arplus.runs.attempt import SupersededError
from arplus.runs.folder import FinalMetrics, RunFolder
from arplus.training.publish import params
from arplus.training.start import resolve

C = TypeVar("C", bound=StudyConfig)
Outcome = Literal["running", "finished", "stopped", "diverged", "failed"]
"""``running`` is all that has not ended, so also what a killed driver left; ``stopped`` ended early, by ASHA."""
OBJECTIVE = "best_response_ppl"
"""What runs are compared by: their lowest response perplexity on validation. Never the total loss, whose scale moves
with λ1."""


@dataclass(kw_only=True)
class Evaluation:
    """What a finished run of an ablation came to, and what the tables say of it besides."""

    splits: dict[str, Any]
    """Groups of metrics by split, as :func:`arplus.evaluation.evaluate.evaluate` gives them."""
    sessions: int
    """Size of the training set."""
    parameters: int
    """Of the network."""


@dataclass(kw_only=True)
class Trial:
    """The record of one run of a study."""

    name: str
    """Name of the run, unique within the study."""
    values: dict[str, Any]
    """What sets it apart from the study's other runs, by dotted name."""
    config: TrainConfig
    """Its settings."""
    outcome: Outcome = "running"
    problem: Annotated[str, FREE_TEXT] = ""
    """Why it diverged or failed."""
    results: list[dict[str, int | float]] = field(default_factory=list)
    """One entry per validation: ``examples``, ``response_ppl`` and the lowest so far."""
    final: FinalMetrics | None = None
    """Of a run that finished."""
    evaluation: Evaluation | None = None
    """Of a run that was evaluated too, as an ablation's are."""
    mlflow_run_id: str | None = None
    kept: Literal["all", "best", "none"] = "all"
    """Which checkpoints the study leaves it; best is the best one without its optimizer state."""

    @property
    def ended(self) -> bool:
        """Whether it need not be run again. What failed is tried again when the study goes on."""
        return self.outcome in ("finished", "stopped", "diverged")

    @property
    def score(self) -> float | None:
        """Its lowest response perplexity; None where it has none, or diverged."""
        return self.results[-1][OBJECTIVE] if self.results and self.outcome != "diverged" else None


@dataclass(frozen=True)
class StudyFacts:
    """The content of ``study.json``."""

    kind: str
    fingerprint: str
    """Of the data."""
    mlflow_run_id: str
    owner: str
    """The job that the study belongs to."""
    config: dict[str, Any]
    """Its settings, of the kind's own type."""


class StudyFolder:
    """What is in a study's folder, by name. All of it waits for storage that is away, so a caller need not."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.facts = Document(storage.join(uri, "study.json"), StudyFacts)
        self.runs = storage.join(uri, "runs")
        """The storage of its runs."""
        self.ray = storage.join(uri, "ray")
        """Ray Tune's own files, of no later use."""

    def run(self, name: str) -> RunFolder:
        """A run's own folder."""
        return RunFolder(storage.join(self.runs, name))

    def trial(self, name: str) -> Document[Trial]:
        """The record of a run."""
        return Document(storage.join(self.uri, "trials", f"{name}.json"), Trial)

    def trials(self) -> list[Trial]:
        """All records, in the order of their names."""
        folder = storage.join(self.uri, "trials")
        files = storage.with_retries(folder, storage.list_files, folder, missing_ok=True)
        # A killed process may have left a file half-written, under another name.
        return [Document(file, Trial).read() for file in files if file.endswith(".json")]

    def write(self, name: str, text: str) -> None:
        """Writes a file."""
        uri = storage.join(self.uri, name)
        storage.with_retries(uri, storage.write_bytes, uri, text.encode())


@dataclass(kw_only=True)
class Study:
    """A study that this process runs."""

    folder: StudyFolder
    facts: StudyFacts
    """As this job has written them; another owner in the file means that another job goes on with the study."""
    config: StudyConfig
    tracked: tracking.RunRef
    """The study's own MLflow run, parent of its runs'."""
    trials: dict[str, Trial]
    """All records, by name, in the order in which they were made."""

    @classmethod
    def begin(cls, config: StudyConfig, *, kind: str, fingerprint: str) -> "Study":
        """Begins the study of ``config``, whose names are filled in, or goes on with it.

        Raises :class:`UsageError` where the name is taken: by a run, by a study of other settings (which are listed) or
        other data, or by any study where --resume is never.
        """
        run = config.run
        folder = StudyFolder(storage.join(run.storage, run.run_name))
        before = folder.facts.find()
        _check_same(folder.facts.uri, before, config, kind, fingerprint)
        if before is None and RunFolder(folder.uri).config.exists():
            raise UsageError(f"--run-name {run.run_name}: {folder.uri} is a training run; take another name")
        tracked = tracking.start_run(
            run.mlflow or tracking.default_uri(run.storage),
            run.experiment,
            run.run_name,
            tags={"kind": kind, "preset": run.preset, "fingerprint": fingerprint} | job.tags(run.tag),
            params={k: v for k, v in flat(config).items() if k not in flat(run)} | params(run),
            resume_run_id=before.mlflow_run_id if before else None,
        )
        mine = StudyFacts(kind, fingerprint, tracked.run_id, owner=uuid4().hex, config=to_dict(config))

        def take_over(there: StudyFacts | None) -> StudyFacts:
            if there is None or there.owner != mine.owner:  # another job's that began at the same moment
                _check_same(folder.facts.uri, there, config, kind, fingerprint)
            return mine

        facts = folder.facts.update(take_over)
        trials = {trial.name: trial for trial in folder.trials()}
        return cls(folder=folder, facts=facts, config=config, tracked=tracked, trials=trials)

    @property
    def name(self) -> str:
        """Its name."""
        return self.config.run.run_name

    @property
    def uri(self) -> str:
        """Its folder's."""
        return self.folder.uri

    @property
    def best(self) -> Trial | None:
        """The run with the lowest response perplexity among those that finished or were stopped early."""
        scored = [t for t in self.trials.values() if t.outcome in ("finished", "stopped") and t.score is not None]
        return min(scored, key=lambda t: t.score or 0.0, default=None)

    def add(self, name: str, values: dict[str, Any], config: TrainConfig) -> Trial:
        """Makes the record of a new run in the study's folder, which is durable before anything starts."""
        # Of its own, whatever the study's: a trial whose process died goes on.
        config = replace(config, run_name=name, storage=self.folder.runs, resume="auto")
        trial = Trial(name=name, values=values, config=config)
        self.trials[name] = trial
        self.save(trial)
        return trial

    def renew(self, trial: Trial) -> None:
        """Gives a run that is to go on the study's settings of today, where it may differ from those it began with."""
        today = flat(self.config.run)
        changed = {name: today[name] for name in names_of_role(TrainConfig, Role.OPERATION)}
        own = {"run_name": trial.name, "storage": self.folder.runs, "resume": "auto"}
        trial.config = with_values(trial.config, changed | own, source=trial.name)

    def save(self, trial: Trial) -> None:
        """Writes a record. Raises :class:`SupersededError` where another job has taken the study over."""
        self.check_owner()
        self.folder.trial(trial.name).write(trial)

    def check_owner(self) -> None:
        """Raises :class:`SupersededError` where another job has taken the study over, and with it all runs."""
        if self.folder.facts.read().owner != self.facts.owner:
            raise SupersededError(f"{self.uri}: another job has taken this study over; this one stops")

    def drop_checkpoints(self) -> None:
        """Leaves those that have ended no checkpoint, but the best run all of its own; unless every one is to stay."""
        for trial in self.trials.values():
            if trial.ended and trial is not self.best and self.config.run.keep_checkpoints != "all":
                self.folder.run(trial.name).checkpoints.delete_all()
                trial.kept = "none"
                self.save(trial)

    def tracked_run(self, trial: Trial) -> tracking.RunRef | None:
        """A run's MLflow run; None where it has not got as far."""
        if trial.mlflow_run_id is None and (owner := self.folder.run(trial.name).read_attempt()) is not None:
            trial.mlflow_run_id = owner.mlflow_run_id
        return self.tracked._replace(run_id=trial.mlflow_run_id) if trial.mlflow_run_id else None


def _check_same(file: str, there: StudyFacts | None, config: StudyConfig, kind: str, fingerprint: str) -> None:
    """Raises :class:`UsageError` unless ``config`` may go on with what ``study.json`` says, if there is one."""
    if there is None:
        return
    other = "take another --run-name"
    if config.run.resume == "never":
        raise UsageError(f"--resume never: {file} exists; {other}, or --resume auto to go on with it")
    if there.kind != kind:
        raise UsageError(f"--run-name {config.run.run_name}: {file} is of a study of kind {there.kind}; {other}")
    if there.fingerprint != fingerprint:
        raise UsageError(
            f"{file}: this study is on data of fingerprint {there.fingerprint}, and {config.run.data} has "
            f"{fingerprint}; {other}"
        )
    theirs = from_dict(type(config), there.config, source=file)
    if different := resume.find_differences(theirs, config, names_of_role(type(config), Role.OPERATION)):
        raise UsageError(f"{file}: this study has other settings ({'; '.join(different)}); {other}")


def resolve_study(config: C, kind: str) -> C:
    """The settings of a study of this kind with every name and path filled in."""
    run = validate(config).run
    name = run.run_name or f"{kind}-{run.preset}"
    if run.init_from and (before := StudyFolder(storage.absolute(storage.join(run.storage, name))).facts.find()):
        run = replace(run, init_from=tracking.as_begun(run.init_from, before.config.get("init_from")))
    run = resolve(replace(run, run_name=name, experiment=run.experiment or name))
    return replace(config, run=replace(run, mlflow=run.mlflow or tracking.default_uri(run.storage)))
