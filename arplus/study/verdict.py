"""Who won a sweep, by how much, and whether that is noise: in words for MLflow's pages, in figures for its tables."""

import logging
from dataclasses import dataclass

from ray.exceptions import RayError

from arplus import storage, tracking
from arplus.config import EvaluateConfig, Sampling, from_dict
from arplus.errors import ArplusError
from arplus.evaluation.evaluate import evaluate
from arplus.study.record import Study, Trial
from arplus.training.failure import reason

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The winner against the runner-up, on the same validation examples: a paired bootstrap."""

    winner: str
    runner_up: str
    difference: float
    """The winner's response perplexity less the other's."""
    low: float
    """The middle 95 % of the resampled differences begin here,"""
    high: float
    """and end here."""
    noise: bool
    """Whether zero is among them."""

    def __str__(self) -> str:
        """In words."""
        bounds = f"95 % of resamples of the validation examples give {self.low:+.4f} to {self.high:+.4f}"
        if self.noise:
            return f"{self.winner} and {self.runner_up} cannot be told apart: the difference is noise ({bounds})"
        return f"{self.winner} and {self.runner_up} differ by more than noise of the examples ({bounds})"


def judge(study: Study) -> Verdict | None:
    """Compares the best run's checkpoint with that of the next one; None, perhaps with a warning, where that cannot be.

    One that ``result.json`` has is taken from there, as the runner-up's checkpoint may be gone.
    """
    ranked = ranking(study)
    if len(ranked) < 2 or not study.config.run.objective.lambda0:  # then the response is not what was trained
        return None
    winner, second = (trial.name for trial in ranked[:2])
    uri = storage.join(study.uri, "result.json")
    before = storage.read_json(uri).get("verdict") if storage.with_retries(uri, storage.exists, uri) else None
    if before and (before["winner"], before["runner_up"]) == (winner, second):
        return from_dict(Verdict, before, source=uri)
    run = study.config.run
    asked = EvaluateConfig(
        checkpoint=study.folder.run(winner).uri,
        against=study.folder.run(second).uri,
        data=run.data,
        split=("valid",),
        device=run.device,
        placement=run.placement,
        sampling=Sampling(max_characters=1),  # the replies are of no interest here
    )
    try:
        found = storage.with_retries(study.uri, evaluate, asked)["comparison"]["valid"]["response_ppl"]
    except (ArplusError, RayError) as error:  # days of trials are not lost for this
        log.warning("%s is not compared with %s: %s", winner, second, reason(error))
        return None
    names = ("difference", "low", "high", "noise")
    return Verdict(winner=winner, runner_up=second, **{name: found[name] for name in names})


def ranking(study: Study) -> list[Trial]:
    """The runs that came to a result, best first."""
    scored = [t for t in study.trials.values() if t.score is not None and t.outcome in ("finished", "stopped")]
    return sorted(scored, key=lambda trial: (trial.score or 0.0, trial.name))


def annotate(study: Study, verdict: Verdict | None) -> None:
    """Says on every run's own page, and in the columns of the compare view, where it came in."""
    ranked = ranking(study)
    lowest = ranked[0].score or 1.0
    found = {}
    for place, trial in enumerate(ranked, 1):
        assert trial.score is not None
        above = 100 * (trial.score / lowest - 1)
        said = f"place {place} of {len(ranked)}: response PPL {trial.score:.3f}"
        said += f", {above:.2f} % above {ranked[0].name}" if place > 1 else ", the winner"
        if verdict is not None and place <= 2:
            said += f"; {verdict}"
        if (run := study.tracked_run(trial)) is not None:
            metrics = {"result/response_ppl": trial.score, "result/percent_above_best": above, "result/place": place}
            found[run] = ({"result": said}, metrics)
    try:
        tracking.annotate(found)
    except ArplusError as error:
        log.warning("the runs' pages do not say how they compare: %s", error)
