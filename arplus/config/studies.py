"""Jobs that make many training runs, or one unusual one: a sweep, an ablation, and the learning-rate range test.

They contain the settings of a run, in line, so that their command lines are that of ``jobs/train.py`` and a few flags
more.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Annotated, Literal

from annotated_types import Ge, Gt

from arplus.config.checks import with_values
from arplus.config.names import model_name_problem
from arplus.config.settings import INLINE, Role
from arplus.config.space import bounds_problem, parse_space
from arplus.config.training import PAPER_ROWS, PRESETS, TrainConfig, tiny
from arplus.config.variants import Row, variants_of


@dataclass(frozen=True, kw_only=True)
class StudyConfig:
    """What all studies have beside the settings of their runs."""

    run: Annotated[TrainConfig, INLINE] = field(default_factory=TrainConfig)
    """What all runs have in common, and the study's own name, experiment and places."""
    examples: Annotated[int | None, Gt(0)] = None
    """Budget of one run: the examples that it trains on. By default --epochs times the training set."""
    validations: Annotated[int, Gt(0)] = 8
    """Validations of one run, evenly spread over its budget, beside those at the end of each epoch."""
    concurrency: Annotated[int | None, Gt(0), Role.OPERATION] = None
    """Runs side by side. By default as many as fit, and at least one. Each worker of a run takes a GPU, or
    --gpus-per-worker of one; on CPUs it takes a CPU."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if problem := model_name_problem(self.run.run_name):
            yield "run_name", problem
        if self.run.resume not in ("auto", "never"):
            yield "resume", f"must be auto or never for a study (got {self.run.resume!r})"
        if self.run.max_steps is not None:
            yield "max_steps", "cannot be set for a study: --examples is the budget of its runs (pass --max-steps None)"
        if self.run.patience is not None:
            yield "patience", "cannot be set for a study: its runs have one budget (pass --patience None)"
        if self.run.validate_every is not None:
            yield (
                "validate_every",
                "cannot be set for a study: --validations counts each run's (pass --validate-every None)",
            )


@dataclass(frozen=True, kw_only=True)
class TuneConfig(StudyConfig):
    """A sweep: trials that differ in some settings, compared by their response perplexity on validation."""

    trials: Annotated[int, Gt(0), Role.OPERATION] = 16
    """Number of trials. A grid needs at least as many as it has points."""
    space: tuple[str, ...] = ()
    """A setting in which trials differ, by its dotted name: NAME=uniform(LOW,HIGH), NAME=loguniform(LOW,HIGH),
    NAME=int(LOW,HIGH) or NAME=choice(A,B,…). optimizer.lr=loguniform(1.5e-4,1e-2) and objective.lambda1=uniform(0,1)
    are there already. The same NAME replaces one of them, and NAME=fixed takes it out."""
    lr_bounds: str | None = None
    """A file that jobs/lr_find.py wrote, from which the bounds of the learning rate are taken."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """How trials are chosen: by Optuna's TPE, which learns from those that have ended; at random; or all points of a
    grid. With optuna and random, the first trial has the settings of the command line, if the space holds them."""
    grid_points: Annotated[int, Ge(2)] = 4
    """With --search grid: points along each range."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops a trial early if it is among the worse ones after the same number of examples. none stops none."""
    reduction: Annotated[float, Gt(1)] = 3.0
    """ASHA's reduction factor. Each rung is this many times as far as the one before, and lets one in this many trials
    pass."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        yield from super().check()
        try:
            dimensions = parse_space(self.space)
        except ValueError as error:
            yield "space", str(error)
            return
        if self.lr_bounds is not None and any(item.partition("=")[0].strip() == "optimizer.lr" for item in self.space):
            yield "lr_bounds", "gives the bounds of optimizer.lr, and --space does so too; leave one out"
        if self.search == "grid":
            sizes = [len(d.grid(self.grid_points)) for d in dimensions]
            if (points := prod(sizes)) > self.trials:
                yield (
                    "trials",
                    f"the grid has {' × '.join(map(str, sizes))} = {points} points; raise --trials or lower "
                    f"--grid-points (got {self.trials})",
                )


@dataclass(frozen=True, kw_only=True)
class LrFindConfig:
    """Smith's learning-rate range test: the rate grows step by step, and the loss says where learning starts and ends.

    The training path is the real one: same feed, engine, workers.
    """

    run: Annotated[TrainConfig, INLINE] = field(default_factory=TrainConfig)
    """The run whose rate is looked for."""
    steps: Annotated[int, Ge(20)] = 200
    """Optimizer steps, each at a higher rate than the one before."""
    lr_from: Annotated[float, Gt(0)] = 1e-6
    """Rate of the first step."""
    lr_to: Annotated[float, Gt(0)] = 1.0
    """Rate of the last step. Most tests stop before they reach it."""
    give_up: Annotated[float, Gt(1)] = 2.0
    """Stop once the smoothed loss is this many times its lowest value."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.lr_from >= self.lr_to:
            yield "lr_from", f"must be below lr_to = {self.lr_to:g} (got {self.lr_from:g})"
        elif problem := bounds_problem("loguniform", self.lr_from, self.lr_to):
            yield "lr_from", f"is LOW and lr_to is HIGH: {problem} (got {self.lr_from:g} and {self.lr_to:g})"
        if self.run.resume not in ("auto", "never"):
            yield "resume", f"must be auto or never for a range test (got {self.run.resume!r})"
        if len(self.run.world_sizes) > 1:
            yield "workers", f"must be one number for a range test, which is short (got {self.run.workers!r})"


@dataclass(frozen=True, kw_only=True)
class AblateConfig(StudyConfig):
    """An ablation: the paper's rows, with several seeds, on training sets of several sizes.

    The settings of a run hold for all rows, but for the network and the optimizer's eps, which make the row.
    """

    row: tuple[str, ...] = ()
    """A preset to train. By default all of the paper's rows; with variants, only the presets that they change."""
    variant: tuple[str, ...] = ()
    """A row of your own: NAME=PRESET,setting=value,… with any setting of a run by its dotted name. Its preset is
    trained too, and the two are compared."""
    preset_study: Literal["ineffective"] | None = None
    """A named set of variants. ineffective: what the paper found ineffective or left out, without a number."""
    seeds: Annotated[int, Gt(0)] = 3
    """Runs of each row, with the seeds --seed, --seed + 1, …"""
    sessions: str = "all"
    """Sizes of the training set in sessions, joined by commas, such as 10000,100000,all."""
    lr: Literal["paper", "common", "tuned"] = "paper"
    """Each row's learning rate. paper: the one that the paper's code used for it. common: --optimizer.lr for all rows.
    tuned: of --rates rates, the one at which the first seed reaches the lowest response perplexity on validation."""
    rates: Annotated[int, Ge(2)] = 4
    """With --lr tuned: rates to try for each row and size, evenly spaced on a log scale from 1.5e-4 to 1e-2."""

    @property
    def tiny(self) -> bool:
        """Whether every row is shrunk."""
        return self.run.model == tiny(PRESETS["arplus"]).model

    @property
    def variants(self) -> list[Row]:
        """The rows of one's own. Raises :class:`ValueError` where they are not valid."""
        return variants_of(self.preset_study, self.variant)

    @property
    def rows(self) -> list[Row]:
        """All rows to train: presets, then variants."""
        variants = self.variants
        presets = dict.fromkeys([*self.row, *(row.preset for row in variants)] or PAPER_ROWS)
        return [*(Row(name, name) for name in presets), *variants]

    def preset_of(self, row: Row) -> TrainConfig:
        """The preset that a row is, or is a variant of; a small one where all are shrunk."""
        return tiny(PRESETS[row.preset]) if self.tiny else PRESETS[row.preset]

    def config_of(self, row: Row) -> TrainConfig:
        """That preset with what a variant changes; the study's own settings are not in it."""
        return with_values(self.preset_of(row), row.values, source=row.name)

    def lr_of(self, row: Row) -> float | None:
        """The learning rate of a row; None where it is to be tuned."""
        if (own := row.values.get("optimizer.lr")) is not None:
            return float(own)
        if self.lr == "tuned":
            return None
        return PRESETS[row.preset].optimizer.lr if self.lr == "paper" else self.run.optimizer.lr

    @property
    def sizes(self) -> list[int | None]:
        """Sizes of the training set in sessions, None for all; empty where ``sessions`` is not valid."""
        names = self.sessions.split(",")
        valid = all(name == "all" or (name.isdecimal() and int(name) > 0) for name in names)
        return [None if name == "all" else int(name) for name in names] if valid else []

    def runs_of(self, row: Row) -> int:
        """Runs of a row at each size: one a seed; where the rate is tuned the first seed's have one for each rate."""
        return self.seeds + (self.rates - 1 if self.lr_of(row) is None else 0)

    @property
    def runs(self) -> int:
        """Runs in all."""
        return len(self.sizes) * sum(map(self.runs_of, self.rows))

    @property
    def most_at_once(self) -> int:
        """Runs that none has to wait for: the rates are tried first, then all seeds."""
        tuned = sum(self.lr_of(row) is None for row in self.rows)
        return len(self.sizes) * max(len(self.rows) * self.seeds, self.rates * tuned)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        yield from super().check()
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            yield "sessions", f"must be different numbers, or all, with commas between (got {self.sessions!r})"
        if unknown := [row for row in self.row if row not in PRESETS]:
            yield "row", f"names no preset of {', '.join(PRESETS)} (got {unknown[0]!r})"
        elif len(set(self.row)) < len(self.row):
            yield "row", "names a preset twice"
        yield from self._check_variants()
        base = tiny(PRESETS["arplus"]) if self.tiny else PRESETS["arplus"]
        if self.run.model != base.model:
            yield "model", "is what the rows differ in; an ablation takes no --model settings"
        if self.lr != "common" and self.run.optimizer.lr != base.optimizer.lr:
            yield "optimizer.lr", f"needs --lr common; with --lr {self.lr} every row has a rate of its own"
        if self.run.optimizer.eps != base.optimizer.eps:
            yield "optimizer.eps", "is each row's own; leave it out"
        if self.run.feed.max_examples is not None:
            yield "feed.max_examples", "is what --sessions sets; leave it out"

    def _check_variants(self) -> Iterator[tuple[str, str]]:
        try:
            for row in self.variants:
                self.config_of(row)
        except ValueError as error:
            yield "variant", str(error)
