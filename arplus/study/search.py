"""What a sweep tries next: Optuna's TPE, random values, or the points of a grid."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from arplus.config import Dimension, TuneConfig, flat
from arplus.study.record import OBJECTIVE, Trial


class Search:
    """Chooses trials, each by the settings, its number and the trials that ended before.

    So a search that goes on chooses what one that was never interrupted would. TPE is the tree-structured Parzen
    estimator (Bergstra et al. 2011); to it trials that run count as bad ones near by, one that ASHA stopped is ranked
    by its last validation behind all that finished, and one that diverged comes last.
    """

    def __init__(self, config: TuneConfig, dimensions: list[Dimension], known: Mapping[int, Trial]) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.config = config
        self.space = {dimension.name: _distribution(dimension) for dimension in dimensions}
        self.first = own_values(config, dimensions)
        axes = [[(d.name, value) for value in d.grid(config.grid_points)] for d in dimensions]
        self.grid = [dict(point) for point in itertools.product(*axes)] if config.search == "grid" else None
        self.study = optuna.create_study()
        self.asked: dict[int, optuna.Trial] = {}
        for number, trial in known.items() if self.grid is None else ():
            self._ask(number, trial.values)
            if trial.ended:
                self.learn(number, trial)

    def choose(self, number: int) -> dict[str, Any] | None:
        """Values of the trial ``number`` (from 1 on) by dotted name; None where there is none any more."""
        if self.grid is not None:
            return self.grid[number - 1] if number <= len(self.grid) else None
        return self._ask(number, self.first if number == 1 else None)

    def learn(self, number: int, trial: Trial) -> None:
        """Takes note of how a trial ended."""
        if (asked := self.asked.pop(number, None)) is None:  # a grid's points are what they are
            return
        if trial.outcome == "finished":
            self.study.tell(asked, trial.score)
            return
        if trial.outcome == "stopped":
            for result in trial.results:
                asked.report(result[OBJECTIVE], int(result["examples"]))
        self.study.tell(asked, state=TrialState.FAIL if trial.outcome == "failed" else TrialState.PRUNED)

    def _ask(self, number: int, values: dict[str, Any] | None) -> dict[str, Any]:
        """The values, or where there are none those that the sampler draws; known to it from now on."""
        if values is not None:
            self.study.enqueue_trial(values)
        seed = int(np.random.SeedSequence([self.config.run.seed, number]).generate_state(1)[0])
        if self.config.search == "random":
            self.study.sampler = optuna.samplers.RandomSampler(seed)
        else:
            start = min(max(3, self.config.trials // 4), 10)  # Optuna's 10 random trials would be all of a small sweep
            self.study.sampler = optuna.samplers.TPESampler(n_startup_trials=start, seed=seed)
        self.asked[number] = self.study.ask(self.space)
        return dict(self.asked[number].params)


def own_values(config: TuneConfig, dimensions: Iterable[Dimension]) -> dict[str, Any] | None:
    """The settings as they are, where the space holds them: the trial that all others must better."""
    settings = flat(config)
    held = all(dimension.holds(settings[dimension.name]) for dimension in dimensions)
    return {dimension.name: settings[dimension.name] for dimension in dimensions} if held else None


def _distribution(dimension: Dimension) -> BaseDistribution:
    if dimension.kind == "choice":
        return CategoricalDistribution(dimension.values)
    if dimension.kind == "int":
        return IntDistribution(*dimension.values)
    low, high = dimension.values
    return FloatDistribution(low, high, log=dimension.kind == "loguniform")
