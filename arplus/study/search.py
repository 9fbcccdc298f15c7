"""What a sweep tries next: Optuna's TPE, random values, or the points of a grid."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from arplus.config import Dimension, TuneConfig, flat
from arplus.study.record import OBJECTIVE, Trial


class Search(Protocol):
    """A way to choose trials. It knows those that ended; it is told of no other."""

    def choose(self, number: int) -> dict[str, Any] | None:
        """Values of the trial ``number`` (from 1 on) by dotted name; None where there is none any more."""
        ...

    def learn(self, number: int, trial: Trial) -> None:
        """Takes note of how a trial ended."""
        ...


def make_search(config: TuneConfig, dimensions: list[Dimension], known: Mapping[int, Trial]) -> Search:
    """The search that ``config`` asks for, which knows the trials that there are already."""
    if config.search == "grid":
        return Grid(config, dimensions)
    if config.search == "random":
        return Random(config, dimensions)
    return Tpe(config, dimensions, known)


def own_values(config: TuneConfig, dimensions: Iterable[Dimension]) -> dict[str, Any] | None:
    """The settings as they are, where the space holds them: the trial that all others must better."""
    settings = flat(config)
    held = all(dimension.holds(settings[dimension.name]) for dimension in dimensions)
    return {dimension.name: settings[dimension.name] for dimension in dimensions} if held else None


class Grid:
    """All combinations of some values of each dimension."""

    def __init__(self, config: TuneConfig, dimensions: list[Dimension]) -> None:
        axes = [[(d.name, value) for value in d.grid(config.grid_points)] for d in dimensions]
        self.points = [dict(point) for point in itertools.product(*axes)]

    def choose(self, number: int) -> dict[str, Any] | None:
        """The point of that number."""
        return self.points[number - 1] if number <= len(self.points) else None

    def learn(self, number: int, trial: Trial) -> None:
        """Nothing: the points are what they are."""


class Random:
    """Independent values, a function of the seed and the trial's number alone."""

    def __init__(self, config: TuneConfig, dimensions: list[Dimension]) -> None:
        self.config = config
        self.dimensions = dimensions

    def choose(self, number: int) -> dict[str, Any] | None:
        """The trial's values."""
        if number == 1 and (own := own_values(self.config, self.dimensions)) is not None:
            return own
        shares = np.random.default_rng([self.config.run.seed, number]).random(len(self.dimensions)).tolist()
        return {d.name: d.at(share) for d, share in zip(self.dimensions, shares, strict=True)}

    def learn(self, number: int, trial: Trial) -> None:
        """Nothing: what is random learns nothing."""


class Tpe:
    """Optuna's tree-structured Parzen estimator (Bergstra et al. 2011); trials that run count as bad ones near by.

    A trial that ASHA stopped is ranked by its last validation behind all that finished, one that diverged last.
    """

    def __init__(self, config: TuneConfig, dimensions: list[Dimension], known: Mapping[int, Trial]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = {dimension.name: _distribution(dimension) for dimension in dimensions}
        # A search that goes on must not draw again what it drew at first.
        seed = int(np.random.SeedSequence([config.run.seed, len(known)]).generate_state(1)[0])
        start = min(max(3, config.trials // 4), 10)  # Optuna's 10 random trials would be all of a small sweep
        sampler = optuna.samplers.TPESampler(n_startup_trials=start, seed=seed)
        self.study = optuna.create_study(sampler=sampler)
        self.open: dict[int, optuna.Trial] = {}
        for number, trial in known.items():
            self._enqueue(number, trial.values)
            if trial.ended:
                self.learn(number, trial)
        if 1 not in known and (own := own_values(config, dimensions)) is not None:
            self.study.enqueue_trial(own)

    def choose(self, number: int) -> dict[str, Any] | None:
        """The estimator's next choice."""
        self.open[number] = self.study.ask(self.space)
        return dict(self.open[number].params)

    def learn(self, number: int, trial: Trial) -> None:
        """Tells the estimator."""
        if trial.outcome == "finished":
            self.study.tell(self.open.pop(number), trial.score)
        else:
            asked = self.open.pop(number)
            if trial.outcome == "stopped":
                for result in trial.results:
                    asked.report(result[OBJECTIVE], int(result["examples"]))
            self.study.tell(asked, state=TrialState.FAIL if trial.outcome == "failed" else TrialState.PRUNED)

    def _enqueue(self, number: int, values: dict[str, Any]) -> None:
        self.study.enqueue_trial(values)
        self.choose(number)


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.values)
    if dimension.kind == "int":
        return IntDistribution(*dimension.values)
    low, high = dimension.values
    return FloatDistribution(low, high, log=dimension.kind == "loguniform")
