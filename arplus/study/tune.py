"""A sweep from beginning to end: its trials, its table, and what it leaves on storage and in MLflow."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from arplus import storage, tracking
from arplus.cluster import preflight
from arplus.config import (
    Dimension,
    TrainConfig,
    TuneConfig,
    parse_space,
    to_dict,
    with_values,
)
from arplus.data.dataset import Dataset
from arplus.errors import UsageError
from arplus.evaluation.sheets import as_csv
from arplus.study import execute, lr_find, verdict
from arplus.study.publish import conclude
from arplus.study.record import OBJECTIVE, Study, Trial, resolve_study
from arplus.study.search import Search
from arplus.study.slots import find_slots, stored_bytes
from arplus.training.estimate import study_report
from arplus.training.start import check_start

log = logging.getLogger(__name__)

MOST_CORNERS = 1_000
"""Combinations of a space's ends that are tried before a sweep starts; one that cannot be ends it when it is drawn."""


def sweep(config: TuneConfig) -> dict[str, Any]:
    """Runs a sweep on the connected Ray cluster, or what is left of it, and returns what ``result.json`` holds.

    Raises :class:`UsageError` for wrong settings or data, :class:`ResourceError` for a cluster that is too small, and
    :class:`RunError` for a sweep that was stopped or in which no trial came to a result.
    """
    config = resolve_study(config, "tune")
    dataset = _dataset(config)
    check_start(config.run, dataset)
    dimensions = space(config, dataset)
    examples = dataset.split("train", config.run.feed.max_examples).examples
    budget = config.examples or config.run.epochs * examples
    slots = find_slots(config, config.trials)
    varied = any(d.name == "precision" and "bf16" in d.values for d in dimensions)
    asked = replace(config.run, precision="bf16") if varied else config.run
    preflight.check_nodes(asked, dataset, stored_bytes([(config.run, config.trials)], slots, dataset.sizes))
    study = Study.begin(config, kind="sweep", fingerprint=dataset.fingerprint)
    with execute.study_session(study) as tracker:
        search = Search(config, dimensions, dict(enumerate(study.trials.values(), 1)))
        source = _Trials(config, study, search, budget, examples, tracker)
        log.info(
            "sweep %s: %d trials of %s examples, %d side by side; %s",
            study.name,
            config.trials,
            f"{budget:,}",
            slots.side_by_side,
            ", ".join(d.text for d in dimensions),
        )
        known = [trial for trial in study.trials.values() if trial.ended and trial.score is not None]
        asha = execute.asha(budget, config.validations, config.reduction, known)
        again = [trial for trial in study.trials.values() if not trial.ended]
        scheduler = asha if config.scheduler == "asha" else None
        execute.execute(study, source, slots, tracker, again=again, scheduler=scheduler)
        execute.check_outcome(study)
        return finish(config, dimensions, study, tracker, dataset)


def space(config: TuneConfig, dataset: Dataset | None = None) -> list[Dimension]:
    """The dimensions of a sweep, each end of which is possible for the run; the rate's from ``--lr-bounds`` if given.

    Raises :class:`UsageError` naming the flag.
    """
    dimensions = parse_space(config.space)
    if config.lr_bounds is not None:
        bounds = lr_find.read_bounds(config.lr_bounds, config.run.preset, dataset.fingerprint if dataset else None)
        rate = Dimension("optimizer.lr", "loguniform", bounds)
        dimensions = [rate, *(d for d in dimensions if d.name != rate.name)]
    ends = [d.values if d.kind == "choice" else (d.values[0], d.values[-1]) for d in dimensions]
    alone = [(f" {d.text}", {d.name: value}) for d, values in zip(dimensions, ends, strict=True) for value in values]
    # Two values may each be possible, and not with each other. Each alone first, for the shorter message.
    names = [d.name for d in dimensions]
    together = (("", dict(zip(names, values, strict=True))) for values in itertools.product(*ends))
    for which, values in itertools.chain(alone, itertools.islice(together, MOST_CORNERS)):
        where = f"--space{which}: at {_shown(values)}"
        run = with_values(config.run, values, source=where)
        if run.objective.compared != config.run.objective.compared:
            raise UsageError(f"{where}: trials cannot be compared with the others")
    return dimensions


def _dataset(config: TuneConfig) -> Dataset:
    dataset = Dataset.open(config.run.data)
    dataset.check_splits("valid", why="trials are compared by the response perplexity on it")
    dataset.check_labels(config.run.model)
    return dataset


def plan(config: TuneConfig) -> str:
    """What a sweep would try, as text, computed without starting anything."""
    dataset = _dataset(config) if config.run.data else None
    dimensions = space(config, dataset)
    lines = [storage.as_json(to_dict(config)), "what trials differ in:"]
    lines += [f"  {dimension.text}" for dimension in dimensions]
    lines += ["", f"trials: {config.trials} by {config.search}, scheduler {config.scheduler}"]
    if dataset is None:
        return "\n".join([*lines, "examples per trial: unknown without --data"])
    examples = dataset.split("train", config.run.feed.max_examples).examples
    budget = config.examples or config.run.epochs * examples
    run = with_budget(config.run, budget, config.validations, examples)
    lines += [f"examples per trial: {budget:,} of {examples:,} per epoch ({run.max_steps:,} steps)"]
    lines += [f"a validation every {run.validate_every:,} steps", ""]
    early = config.scheduler == "asha"
    return "\n".join(
        [*lines, *study_report([(run, budget)] * config.trials, dataset, config.concurrency, ends_early=early)]
    )


def with_budget(run: TrainConfig, budget: int, validations: int, examples: int) -> TrainConfig:
    """A run of at least ``budget`` examples out of ``examples`` per epoch, with evenly spread validations."""
    epochs, rest = divmod(budget, examples)
    steps = epochs * math.ceil(examples / run.batch_size) + math.ceil(rest / run.batch_size)
    return replace(
        run,
        epochs=epochs + (rest > 0),
        max_steps=steps,
        validate_every=max(math.ceil(steps / validations), 1),
    )


@dataclass
class _Trials(execute.Source):
    """The trials of a sweep, and what is said of them."""

    config: TuneConfig
    study: Study
    search: Search
    budget: int
    examples: int
    tracker: tracking.Tracker

    def next(self) -> Trial | None:
        """The next trial, up to ``--trials`` of them."""
        number = len(self.study.trials) + 1
        values = self.search.choose(number) if number <= self.config.trials else None
        if values is None:
            return None
        name = f"trial-{number:04d}"
        run = with_values(self.config.run, values, source=f"--space: {name} ({_shown(values)})")
        run = with_budget(run, self.budget, self.config.validations, self.examples)
        return self.study.add(name, values, run)

    def tell(self, trial: Trial) -> None:
        """Lets the search learn, and tracks the best so far."""
        self.search.learn(list(self.study.trials).index(trial.name) + 1, trial)
        if self.study.best is not None and self.study.best.score is not None:
            ended = sum(t.ended for t in self.study.trials.values())
            self.tracker.log({"best/response_ppl": self.study.best.score}, step=ended)

    def progress(self) -> str:
        """How many trials have ended, and the table."""
        ended = sum(t.outcome != "running" for t in self.study.trials.values())
        return f"{ended} of {self.config.trials} trials have ended\n{table(self.study, self.budget)}"


def table(study: Study, budget: int, rows: int = 20) -> str:
    """The trials, best first, each with its values, how far it is, and its response perplexity."""
    trials = sorted(study.trials.values(), key=lambda t: (math.inf if t.score is None else t.score, t.name))
    names = list(dict.fromkeys(name for t in trials for name in t.values))
    head = ["trial", *(name.rpartition(".")[2] for name in names), "examples", "response PPL", "outcome"]
    lines = [head]
    for trial in trials[:rows]:
        examples = int(trial.results[-1]["examples"]) if trial.results else 0
        score = "" if trial.score is None else f"{trial.score:.3f}"
        values = [_value(trial.values.get(name)) for name in names]
        lines.append([trial.name, *values, f"{examples:,} ({examples / budget:.0%})", score, trial.outcome])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, *([f"… {len(trials) - rows} more"] if len(trials) > rows else [])])


def rows(study: Study) -> list[dict[str, Any]]:
    """All trials as the rows of ``trials.csv``."""
    names = dict.fromkeys(name for t in study.trials.values() for name in t.values)
    return [
        {"trial": t.name}
        | {name: t.values.get(name) for name in names}
        | {"examples": t.results[-1]["examples"] if t.results else 0, OBJECTIVE: t.score, "outcome": t.outcome}
        | {"mlflow_run_id": t.mlflow_run_id}
        for t in study.trials.values()
    ]


def finish(
    config: TuneConfig, dimensions: Sequence[Dimension], study: Study, tracker: tracking.Tracker, dataset: Dataset
) -> dict[str, Any]:
    """Writes the best settings and all figures, tracks them on the parent, and registers the best model."""
    best = study.best
    assert best is not None
    assert best.score is not None
    run = study.tracked_run(best)
    assert run is not None
    settings = with_values(config.run, best.values, source="the best trial")
    settings = replace(settings, run_name=f"{study.name}-best", experiment=TrainConfig().experiment)
    runs = [r for t in verdict.ranking(study)[:10] if (r := study.tracked_run(t)) is not None]
    for trial in study.trials.values():
        study.save(trial)
    judged = verdict.judge(study)
    verdict.annotate(study, judged)
    result: dict[str, Any] = {
        "study": study.name,
        "best": best.name,
        "values": best.values,
        "response_ppl": best.score,
        "config": storage.join(study.uri, "best_config.json"),
        "checkpoint": study.folder.run(best.name).uri,
        "verdict": judged and asdict(judged),
        "model": None,
        "serve": tracking.open_command(study.tracked.uri),
        "runs_url": tracking.study_url(study.tracked),
        "compare_url": tracking.compare_url(runs),
        "trials": [asdict(trial) | {"config": None, "kept": None} for trial in study.trials.values()],
    }
    files = {"best_config.json": storage.as_json(to_dict(settings)), "trials.csv": as_csv(rows(study))}
    conclude(study, tracker, dataset, result, files)
    study.drop_checkpoints()  # the runner-up's was needed for the verdict, which result.json now holds
    final = best.final.flat() if best.final else {}
    figures = {key: value for key, value in final.items() if isinstance(value, int | float)}
    ended = sum(trial.ended for trial in study.trials.values())
    tracker.log({f"best/{key}": value for key, value in figures.items() if key != OBJECTIVE}, step=ended)
    tracker.set_tags(
        {
            "best": best.name,
            "best.run": run.run_id,
            tracking.NOTE: _described(config, dimensions, study, judged, result),
        }
        | {f"best.{k}": _value(v) for k, v in best.values.items()}
    )
    return result


def _described(
    config: TuneConfig,
    dimensions: Sequence[Dimension],
    study: Study,
    judged: verdict.Verdict | None,
    result: Mapping[str, Any],
) -> str:
    """The sweep's page: who won, by how much, whether it is noise, and where things are."""
    ranked = verdict.ranking(study)
    best, others = ranked[0], ranked[1:]
    what = config.run.objective.compared.lower()
    said = f"**{best.name} won with a {what} of {best.score:.3f}** ({_shown(best.values)})"
    if others and best.score and others[0].score:
        early = ", which was stopped early" if others[0].outcome == "stopped" else ""
        below = 100 * (1 - best.score / others[0].score)
        said += f", {below:.2f} % below {others[0].name}{early}: {judged or 'not judged'}"
    names = list(dict.fromkeys(name for trial in ranked for name in trial.values))
    rows = [["trial", *names, "PPL", "outcome"], ["---"] * (len(names) + 3)]
    rows += [[t.name, *(_value(t.values.get(n)) for n in names), f"{t.score:.3f}", t.outcome] for t in ranked[:10]]
    # MLflow draws no space between columns: em spaces, which Markdown leaves.
    table = "\n".join(f"| {' | '.join(cell if cell == '---' else f'{cell}&emsp;' for cell in row)} |" for row in rows)
    model = f"Its model is `{result['model']}`. " if result["model"] else ""
    return (
        f"{said}. Every trial had one seed; another one may change more than the examples do.\n\n"
        f"{model}Train with its settings: `jobs/train.py --config {result['config']}`. "
        f"[Compare the trials]({result['compare_url']}).\n\n{table}\n\n"
        f"{len(study.trials)} trials over {', '.join(f'`{d.text}`' for d in dimensions)} on `{config.run.data}`."
    )


def _shown(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_value(value)}" for name, value in values.items())


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
