"""An ablation from beginning to end: rows × training sizes × seeds, evaluated, as the paper's tables.

A run of the study is one row at one size with one seed. With tuned rates the first seed's runs at all rates come
first; the best of them is that seed's result, and its rate that of the other seeds.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from arplus import storage, tracking
from arplus.cluster import preflight
from arplus.config import (
    AblateConfig,
    EvaluateConfig,
    Row,
    TrainConfig,
    VocabularySizes,
    to_dict,
    with_values,
)
from arplus.data.dataset import Dataset, Split
from arplus.errors import ArplusError, UsageError
from arplus.evaluation.delivery import destination, track
from arplus.evaluation.evaluate import evaluate
from arplus.model.cost import live_parameters, outline
from arplus.runs import checkpoint
from arplus.study import execute, report, results
from arplus.study.publish import conclude
from arplus.study.record import Evaluation, Study, Trial, resolve_study
from arplus.study.slots import Slots, find_slots, stored_bytes
from arplus.study.tune import with_budget
from arplus.training.estimate import study_report
from arplus.training.start import check_start, resolve

log = logging.getLogger(__name__)

LOWEST_RATE, HIGHEST_RATE = 1.5e-4, 1e-2
"""Between them lie the rates that are tried; the lowest is the floor of the paper's schedule."""


@dataclass(frozen=True)
class RunSpec:
    """One row at one size with one seed and, with tuned rates, at one of them."""

    row: Row
    sessions: int
    examples: int
    seed: int
    lr: float

    @property
    def name(self) -> str:
        """The run's name."""
        return f"{self.row.name}-{self.sessions}-seed-{self.seed}-lr-{self.lr:.2e}"

    @property
    def values(self) -> dict[str, Any]:
        """What sets the run apart."""
        return {
            "preset": self.row.preset,
            **({"variant": self.row.name} if self.row.is_variant else {}),
            "feed.max_examples": self.examples,
            "seed": self.seed,
            **self.row.values,
            "optimizer.lr": self.lr,
        }


def ablate(config: AblateConfig) -> dict[str, Any]:
    """Runs an ablation on the connected Ray cluster, or what is left of it, and returns what ``result.json`` holds.

    Raises :class:`UsageError` for wrong settings or data, :class:`ResourceError` for a cluster that is too small, and
    :class:`RunError` for a study that was stopped or of which no run came to a result.
    """
    config = resolve_study(config, "ablate")
    dataset = _dataset(config)
    sizes = training_sets(config, dataset)
    _check_variants(config, dataset, sizes[0])
    slots = find_slots(config, config.most_at_once)
    runs = [(run, count) for run, count, _ in planned(config, sizes)]
    preflight.check_nodes(config.run, dataset, stored_bytes(runs, slots, dataset.sizes))
    study = Study.begin(config, kind="ablation", fingerprint=dataset.fingerprint)
    with execute.study_session(study) as tracker:
        if config.lr == "tuned":
            run_missing(config, study, slots, [row for size in sizes for row in rate_specs(config, size)], tracker)
        # Once: the tables are of these rows, whichever rates an earlier command chose.
        rows = [row for size in sizes for row in seed_specs(config, size, study)]
        run_missing(config, study, slots, rows, tracker)
        execute.check_outcome(study)
        evaluate_missing(config, study, dataset, rows)
        study.drop_checkpoints()
        return _conclude(study, config, tracker, dataset, rows)


def plan(config: AblateConfig) -> str:
    """What an ablation would run, as text, computed without starting anything."""
    lines = [storage.as_json(to_dict(config))]
    of_each = f"{config.seeds} seeds" + (f" and {config.rates} rates for the first" if config.lr == "tuned" else "")
    lines.append(f"{config.runs} runs: {len(config.rows)} rows × {len(config.sizes)} sizes × {of_each}")
    lines += [f"  {row.name}: {report.settings_of(row)}" for row in config.variants]
    if config.run.data:
        dataset = _dataset(config)
        sizes = training_sets(config, dataset)
        for size in sizes:
            budget = _budget(config, size.examples)
            lines.append(f"  {size.sessions:,} sessions: {size.examples:,} examples, {budget:,} a run")
        runs = [(run, budget) for run, count, budget in planned(config, sizes) for _ in range(count)]
        lines += ["", *study_report(runs, dataset, config.concurrency, ends_early=False)]
    return "\n".join(lines)


def planned(config: AblateConfig, sizes: Sequence[Split]) -> Iterator[tuple[TrainConfig, int, int]]:
    """Of each row and size the settings of a run, but for its seed and rate, how many there are, and its examples."""
    for size in sizes:
        for row in config.rows:
            spec = RunSpec(row, size.sessions, size.examples, config.run.seed, config.run.optimizer.lr)
            yield settings(config, spec), config.runs_of(row), _budget(config, size.examples)


def _budget(config: AblateConfig, examples: int) -> int:
    """Examples that a run trains on, of so many per epoch."""
    return config.examples or config.run.epochs * examples


def _dataset(config: AblateConfig) -> Dataset:
    dataset = Dataset.open(config.run.data)
    dataset.check_splits("valid", "test", why="an ablation chooses checkpoints by the one and reports the other")
    dataset.check_labels(*(config.preset_of(row).model for row in config.rows))
    return dataset


def training_sets(config: AblateConfig, dataset: Dataset) -> list[Split]:
    """The training sets, smallest first. Raises :class:`UsageError` for too many sessions, or one set twice."""
    whole = dataset.split("train")
    found = []
    for sessions in config.sizes:
        # Rows are in no session's order, so N sessions are as many examples as N sessions have on average.
        first = None if sessions is None else max(round(sessions * whole.examples / max(whole.sessions, 1)), 1)
        found.append(dataset.split("train", first))
    if len({split.examples for split in found}) < len(found):
        raise UsageError(
            f"--sessions {config.sessions}: two of these are the same set; the training split has "
            f"{whole.sessions:,} sessions"
        )
    return sorted(found, key=lambda split: split.examples)


def _check_variants(config: AblateConfig, dataset: Dataset, size: Split) -> None:
    """Raises :class:`UsageError` now for files that every run of a variant would miss, or find that they do not fit."""
    for row in config.variants:
        spec = RunSpec(row, size.sessions, size.examples, config.run.seed, config.lr_of(row) or LOWEST_RATE)
        try:
            run = resolve(settings(config, spec))
            dataset.check_labels(run.model)
            check_start(run, dataset)
            if run.init_from is not None:
                with tracking.fetched(run.init_from, run.mlflow) as folder:
                    checkpoint.find(folder)
        except UsageError as error:
            raise UsageError(f"--variant {row.name}: {error}") from None


def rate_specs(config: AblateConfig, size: Split) -> list[RunSpec]:
    """The first seed's runs at all rates, of every row that does not say its own."""
    step = (HIGHEST_RATE / LOWEST_RATE) ** (1 / (config.rates - 1))
    rates = [float(f"{LOWEST_RATE * step**i:.3g}") for i in range(config.rates)]
    rows = [row for row in config.rows if config.lr_of(row) is None]
    return [RunSpec(row, size.sessions, size.examples, config.run.seed, lr) for row in rows for lr in rates]


def seed_specs(config: AblateConfig, size: Split, study: Study) -> list[RunSpec]:
    """The runs of every row with all seeds, at the rate that the row is to have."""
    found = []
    for row in config.rows:
        lr = config.lr_of(row)
        if lr is None:
            tried = [spec for spec in rate_specs(config, size) if spec.row == row]
            finished = [t for spec in tried if (t := study.trials.get(spec.name)) and t.outcome == "finished"]
            scored = [trial for trial in finished if trial.score is not None]
            if not scored:
                log.warning("%s with %d sessions: no learning rate gave a result", row.name, size.sessions)
                continue
            lr = float(min(scored, key=lambda trial: trial.score or 0.0).values["optimizer.lr"])
        found += [RunSpec(row, size.sessions, size.examples, config.run.seed + i, lr) for i in range(config.seeds)]
    return found


def settings(config: AblateConfig, spec: RunSpec) -> TrainConfig:
    """The settings of a run."""
    own = config.preset_of(spec.row)
    run = replace(
        config.run,
        preset=own.preset,
        model=own.model,
        optimizer=replace(config.run.optimizer, lr=spec.lr, eps=own.optimizer.eps),
        seed=spec.seed,
        feed=replace(config.run.feed, max_examples=spec.examples),
    )
    run = with_values(run, spec.row.values, source=f"--variant {spec.row.name}")
    return with_budget(run, _budget(config, spec.examples), config.validations, spec.examples)


@dataclass
class _Rows(execute.Source):
    """Rows that have no run yet, in order."""

    config: AblateConfig
    study: Study
    left: list[RunSpec]

    def next(self) -> Trial | None:
        """The record of the next row's run."""
        if not self.left:
            return None
        row = self.left.pop(0)
        return self.study.add(row.name, row.values, resolve(settings(self.config, row)))

    def progress(self) -> str:
        """How many runs have ended, and how far the others are."""
        running = [t for t in self.study.trials.values() if t.outcome == "running"]
        now = [f"{t.name} " + (f"PPL {t.results[-1]['response_ppl']:.2f}" if t.results else "begins") for t in running]
        left = f", {len(self.left)} to come" if self.left else ""
        return f"{len(self.study.trials) - len(running)} runs have ended{left}; now {'; '.join(now) or 'none'}"


def run_missing(
    config: AblateConfig, study: Study, slots: Slots, rows: list[RunSpec], tracker: tracking.Tracker
) -> None:
    """Runs what has no run yet, and goes on with what has not ended."""
    source = _Rows(config, study, [row for row in rows if row.name not in study.trials])
    again = [study.trials[row.name] for row in rows if row.name in study.trials and not study.trials[row.name].ended]
    log.info("%s: %d runs to do, %d side by side", study.name, len(source.left) + len(again), slots.side_by_side)
    if source.left or again:
        execute.execute(study, source, slots, tracker, again=again)


def evaluate_missing(config: AblateConfig, study: Study, dataset: Dataset, rows: list[RunSpec]) -> None:
    """Evaluates what has not been evaluated yet: the best checkpoint of every run that the tables have."""
    wanted = {row.name: row for row in rows}
    for trial in study.trials.values():
        if trial.name not in wanted or trial.outcome != "finished" or trial.evaluation is not None:
            continue
        uri = study.folder.run(trial.name).uri
        run = config.run
        asked = EvaluateConfig(checkpoint=uri, data=run.data, device=run.device, placement=run.placement)
        found = storage.with_retries(study.uri, evaluate, asked)
        trial.evaluation = Evaluation(
            splits=found["splits"],
            sessions=wanted[trial.name].sessions,
            parameters=_parameters(trial.config, dataset.sizes),
        )
        study.save(trial)
        try:
            track(found, destination(asked))
        except ArplusError as error:  # the tables have what they need
            again = f"jobs/evaluate.py --checkpoint {asked.checkpoint} --data {asked.data}"
            log.warning("%s: MLflow lacks its evaluation, which %s logs: %s", trial.name, again, error)
        log.info("%s: test response PPL %.3f", trial.name, found["splits"]["test"]["standard"]["response_ppl"])


def _parameters(run: TrainConfig, sizes: VocabularySizes) -> int:
    return sum(live_parameters(outline(run.model, sizes)).values())


def _conclude(
    study: Study, config: AblateConfig, tracker: tracking.Tracker, dataset: Dataset, wanted: list[RunSpec]
) -> dict[str, Any]:
    """Writes tables, figure and all numbers, tracks them on the parent, and registers the best model."""
    rows = results.rows(study.trials[row.name] for row in wanted if row.name in study.trials)
    evaluated = [study.tracked_run(t) for t in study.trials.values() if t.evaluation is not None]
    study_url = tracking.study_url(study.tracked)
    compare_url = tracking.compare_url([run for run in evaluated if run is not None])
    unfinished = {t.name: t.problem for t in study.trials.values() if t.outcome in ("failed", "diverged")}
    result: dict[str, Any] = {
        "study": study.name,
        "rows": results.as_json(rows),
        "model": None,
        "checkpoint": None if study.best is None else study.folder.run(study.best.name).uri,
        "serve": tracking.open_command(study.tracked.uri),
        "runs_url": study_url,
        "compare_url": compare_url,
        "unfinished": unfinished,
    }
    page = report.page(config, rows, study_url=study_url, compare_url=compare_url, unfinished=unfinished)
    conclude(study, tracker, dataset, result, {"report.html": page})
    text = report.text(config, rows)
    tracker.log_text("tables.txt", text)
    said = (
        f"The paper's rows on `{config.run.data}`: {len(rows)} rows of {config.seeds} seeds. A difference to AR+, "
        f"or of a variant to its preset, is noise where {report.NOISE} stands. "
        f"[The report]({tracking.run_url(study.tracked, 'artifacts/report.html')}), also in `{study.uri}`; "
        f"[the runs compared]({compare_url}).\n\n```\n{text}\n```"  # last: MLflow takes 5,000 characters
    )
    tracker.set_tags({tracking.NOTE: said})
    largest = max((key.sessions for key in rows), default=0)
    for key, cells in rows.items():
        if key.sessions == largest and "response_ppl" in cells:
            tracker.log({f"response_ppl/{key.preset}": cells["response_ppl"].mean}, step=largest)
    for row in config.variants:
        mine, base = rows.get(results.Key(largest, row.name)), rows.get(results.Key(largest, row.preset))
        if mine and base and (less := results.effect(mine, base)):
            tracker.log({f"response_ppl_against_{row.preset}_percent/{row.name}": less.mean}, step=largest)
    return result | {"report": storage.join(study.uri, "report.html"), "text": text}


def shown(result: Mapping[str, Any]) -> str:
    """The tables, and what has no place in them, as the job prints them at its end."""
    if not result["unfinished"]:
        return str(result["text"])
    return f"{result['text']}\n\nwithout a result: {', '.join(result['unfinished'])}"
