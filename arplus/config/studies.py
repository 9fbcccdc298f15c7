"""Jobs that make many training runs, or one unusual one: a sweep, and the learning-rate range test.

Their settings are those of a run and a few more, so that their command lines are that of ``jobs/train.py`` and a few
flags more.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt

from arplus.config.checks import from_dict, to_dict
from arplus.config.names import model_name_problem
from arplus.config.space import bounds_problem, parse_space
from arplus.config.training import PAPER_ROWS, PRESETS, TrainConfig, tiny


@dataclass(frozen=True, kw_only=True)
class StudyConfig(TrainConfig):
    """What all studies have beside the settings of their runs."""

    run_name: str = ""
    """Name of the study, its folder and its best model in MLflow; the job's and the preset's name where empty."""
    experiment: str = ""
    """MLflow experiment; the study's name where empty."""
    resume: str = "auto"
    """auto goes on with the study of this name if there is one; never refuses an existing name."""
    examples: Annotated[int, Gt(0)] | None = None
    """Budget of one run: the examples that it trains on. By default --epochs times the training set."""
    validations: Annotated[int, Gt(0)] = 8
    """Validations of one run, evenly spread over its budget, beside those at the end of each epoch."""
    concurrency: Annotated[int, Gt(0)] | None = None
    """Runs side by side; by default as many as the cluster has living GPUs for, or, on CPUs, whole CPUs, or one."""

    def run_name_problem(self) -> str | None:
        """What is wrong with the study's name, which is its best model's too."""
        return model_name_problem(self.run_name)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        yield from super().check()
        yield from self.name_problems()
        if self.resume not in ("auto", "never"):
            yield "resume", f"must be auto or never for a study (got {self.resume!r})"
        if self.max_steps is not None:
            yield "max_steps", "is not a study's: --examples is the budget of its runs (pass --max-steps None)"
        if self.patience is not None:
            yield "patience", "is not a study's: its runs have one budget, to be compared (pass --patience None)"
        if self.validate_every is not None:
            yield "validate_every", "is not a study's: --validations counts them (pass --validate-every None)"


@dataclass(frozen=True, kw_only=True)
class TuneConfig(StudyConfig):
    """A sweep: trials that differ in some settings, compared by their response perplexity on validation."""

    trials: Annotated[int, Gt(0)] = 16
    """Trials in all; of a grid, at least as many as it has points."""
    space: tuple[str, ...] = ()
    """What trials differ in (repeatable): NAME=uniform(LOW,HIGH), NAME=loguniform(LOW,HIGH), NAME=int(LOW,HIGH) or
    NAME=choice(A,B,…), where NAME is any setting's dotted name. optimizer.lr=loguniform(1.5e-4,1e-2) and
    objective.lambda1=uniform(0,1) are there unless replaced; NAME=fixed takes one out."""
    lr_bounds: str | None = None
    """File that jobs/lr_find.py wrote: the learning rate's bounds are taken from it."""
    search: Literal["optuna", "random", "grid"] = "optuna"
    """How trials are chosen: by Optuna's TPE, which learns from the finished ones; at random; or all points of a grid.
    But for the grid, the first trial has the settings as they are, where the space holds them."""
    grid_points: Annotated[int, Ge(2)] = 4
    """Points of a grid along each range."""
    scheduler: Literal["asha", "none"] = "asha"
    """asha stops a trial early that is among the worse ones after the same number of examples."""
    reduction: Annotated[float, Gt(1)] = 3.0
    """ASHA's factor: each rung is this many times as far as the one before, and lets one in this many trials pass."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        yield from super().check()
        try:
            dimensions = parse_space(self.space)
        except ValueError as error:
            yield "space", str(error)
            return
        if self.lr_bounds is not None and any(item.startswith("optimizer.lr=") for item in self.space):
            yield "lr_bounds", "gives the bounds of optimizer.lr, and --space does so too; leave one out"
        if self.search == "grid":
            sizes = [len(d.grid(self.grid_points)) for d in dimensions]
            points = 1
            for size in sizes:
                points *= size
            if points > self.trials:
                yield (
                    "trials",
                    f"the grid has {' × '.join(map(str, sizes))} = {points} points; raise --trials or lower "
                    f"--grid-points (got {self.trials})",
                )


@dataclass(frozen=True, kw_only=True)
class LrFindConfig(TrainConfig):
    """Smith's learning-rate range test: the rate grows step by step, and the loss says where learning starts and ends.

    The training path is the real one: same feed, engine, workers.
    """

    run_name: str = ""
    """Name of the test and of its folder; lr-PRESET where empty."""
    resume: str = "auto"
    """auto makes the test anew where there is one of this name; never refuses an existing name."""
    steps: Annotated[int, Ge(20)] = 200
    """Optimizer steps, each at a higher rate than the one before."""
    lr_from: Annotated[float, Gt(0)] = 1e-6
    """Rate of the first step."""
    lr_to: Annotated[float, Gt(0)] = 1.0
    """Rate of the last step, which is rarely reached."""
    give_up: Annotated[float, Gt(1)] = 2.0
    """Stop once the smoothed loss is this many times the lowest one."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        yield from super().check()
        if self.lr_from >= self.lr_to:
            yield "lr_from", f"must be below lr_to = {self.lr_to:g} (got {self.lr_from:g})"
        elif problem := bounds_problem("loguniform", self.lr_from, self.lr_to):
            yield "lr_from", f"is LOW and lr_to is HIGH: {problem} (got {self.lr_from:g} and {self.lr_to:g})"
        if self.resume not in ("auto", "never"):
            yield "resume", f"must be auto or never for a range test (got {self.resume!r})"
        if len(self.world_sizes) > 1:
            yield "workers", f"must be one number for a range test, which is short (got {self.workers!r})"


@dataclass(frozen=True, kw_only=True)
class AblateConfig(StudyConfig):
    """An ablation: the paper's rows, with several seeds, on training sets of several sizes.

    The settings of a run hold for all rows, but for the network and the optimizer's eps, which make the row.
    """

    tiny: bool = False
    """Shrink every row; what --tiny says."""
    row: tuple[str, ...] = ()
    """A preset to train (repeatable); by default all of the paper's rows."""
    seeds: Annotated[int, Gt(0)] = 3
    """Runs of each row, with the seeds --seed, --seed + 1, …"""
    sessions: str = "all"
    """Sizes of the training set in sessions, such as 10000,100000,all."""
    lr: Literal["paper", "common", "tuned"] = "paper"
    """Each row's learning rate: the one that the paper's code used for it; --optimizer.lr for all rows; or, of --rates
    rates, the one at which the first seed reaches the lowest response perplexity on validation."""
    rates: Annotated[int, Ge(2)] = 4
    """With --lr tuned: rates tried for each row and size, evenly spaced in log from 1.5e-4 to 1e-2."""

    @property
    def rows(self) -> tuple[str, ...]:
        """The presets to train."""
        return self.row or tuple(PAPER_ROWS)

    @property
    def sizes(self) -> list[int | None]:
        """Sizes of the training set in sessions, None for all; empty where ``sessions`` is not valid."""
        names = self.sessions.split(",")
        valid = all(name == "all" or (name.isdecimal() and int(name) > 0) for name in names)
        return [None if name == "all" else int(name) for name in names] if valid else []

    @property
    def runs(self) -> int:
        """Runs in all; with tuned rates the first seed's have one for each rate."""
        tried = self.rates - 1 if self.lr == "tuned" else 0
        return len(self.rows) * len(self.sizes) * (self.seeds + tried)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        yield from super().check()
        if not self.sizes or len(set(self.sizes)) < len(self.sizes):
            yield "sessions", f"must be different numbers, or all, with commas between (got {self.sessions!r})"
        if unknown := [row for row in self.rows if row not in PRESETS]:
            yield "row", f"names no preset of {', '.join(PRESETS)} (got {unknown[0]!r})"
        elif len(set(self.rows)) < len(self.rows):
            yield "row", "names a preset twice"
        base = tiny(PRESETS["arplus"]) if self.tiny else PRESETS["arplus"]
        if self.model != base.model:
            yield "model", "is what the rows differ in; an ablation takes no --model settings"
        if self.lr != "common" and self.optimizer.lr != base.optimizer.lr:
            yield "optimizer.lr", f"needs --lr common; with --lr {self.lr} every row has a rate of its own"
        if self.optimizer.eps != base.optimizer.eps:
            yield "optimizer.eps", "is each row's own; leave it out"
        if self.feed.max_examples is not None:
            yield "feed", "--feed.max-examples is what --sessions sets; leave it out"


def run_settings(config: TrainConfig) -> TrainConfig:
    """The settings of a run within those of a study."""
    return TrainConfig(**{f.name: getattr(config, f.name) for f in fields(TrainConfig)})


def with_values(run: TrainConfig, values: Mapping[str, Any], *, source: str) -> TrainConfig:
    """A run's settings with others by dotted name. Raises :class:`UsageError` naming ``source`` for what cannot be."""
    plain = to_dict(run)
    for name, value in values.items():
        *path, last = name.split(".")
        section = plain
        for key in path:
            section = section[key]
        section[last] = value
    return from_dict(TrainConfig, plain, source=source)


def study_settings(kind: type[Any], run: TrainConfig) -> Any:
    """A study of class ``kind`` with its own defaults, of runs that are set as ``run``."""
    own = {"run_name", "experiment", "resume"}
    return kind(**{f.name: getattr(run, f.name) for f in fields(TrainConfig) if f.name not in own})
