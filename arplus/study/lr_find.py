"""Smith's learning-rate range test on the real training path: feed, engine and workers are those of a run.

The rate grows by the same factor at every step, from far too low to far too high (Smith 2017, "Cyclical Learning
Rates", section 3.3). The response's loss L_D first stands still, then falls, then rises: between the last two lie the
rates that are worth a sweep.
"""

import io
import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from ray.train import ScalingConfig, TrainingFailedError

from arplus import storage, tracking
from arplus.cluster import job, preflight
from arplus.cluster.scaling import size_workers
from arplus.config import LrFindConfig
from arplus.config.space import bounds_problem
from arplus.data.dataset import Dataset
from arplus.errors import ArplusError, RunError, UsageError
from arplus.evaluation.sheets import as_csv
from arplus.runs import attempt
from arplus.study.record import StudyFolder
from arplus.training import workers
from arplus.training.publish import params
from arplus.training.start import check_start, resolve

log = logging.getLogger(__name__)

FILE = "lr_range.json"
"""The result in the test's folder: the curve, the suggestion, and the bounds that a sweep takes."""
_SMOOTHED_SHARE = 0.1
"""Part of the steps that one point of the smoothed curve is the mean of."""
_BEGUN = 0.1
"""Part of the whole fall of the loss after which learning has begun: the lower bound."""


def find(config: LrFindConfig) -> dict[str, Any]:
    """Runs the range test on the connected Ray cluster and returns what ``lr_range.json`` holds.

    Raises :class:`UsageError` for wrong settings or data, :class:`ResourceError` for a cluster that is too small and
    :class:`RunError` where the loss never fell or the workers died.
    """
    run = resolve(replace(config.run, run_name=config.run.run_name or f"lr-{config.run.preset}"))
    run = replace(run, mlflow=run.mlflow or tracking.default_uri(run.storage))
    config = replace(config, run=run)
    dataset = Dataset.open(run.data)
    dataset.check_labels(run.model)
    check_start(run, dataset)
    scaling = size_workers(run)
    preflight.check_nodes(run, dataset, 0)  # it writes no checkpoint
    folder = StudyFolder(storage.join(run.storage, run.run_name))
    uri = folder.uri
    if run.resume == "never" and storage.exists(storage.join(uri, FILE)):
        raise UsageError(f"--resume never: {uri} exists; take another --run-name, or --resume auto to make it anew")
    if attempt.read(uri) is not None or storage.exists(folder.facts.uri):
        raise UsageError(f"--run-name {run.run_name}: {uri} is a run or a study; take another name")
    assert run.mlflow is not None
    tags = {"kind": "lr range test", "preset": run.preset, "fingerprint": dataset.fingerprint} | job.tags(run.tag)
    tracked = tracking.start_run(run.mlflow, run.experiment, run.run_name, tags=tags, params=params(run))
    with tracking.Tracker.beside(tracked, uri) as tracker:
        tracker.log_dataset(Path(run.data).name, dataset.fingerprint, run.data, "training")
        points = _run(config, scaling, uri)
        for number, point in enumerate(points):
            tracker.log({f"lr_range/{key}": value for key, value in point.items()}, step=number)
        result: dict[str, Any] = {
            "preset": run.preset,
            "fingerprint": dataset.fingerprint,
            "mlflow_url": tracking.run_url(tracked),
            "lr": analyse([p["lr"] for p in points], [p["dialogue_loss"] for p in points]),
            "points": points,
        }
        files = {
            FILE: json.dumps(result, indent=2) + "\n",
            "lr_range.csv": as_csv(points),
            "lr_range.svg": plot(points, result["lr"], f"{run.preset}: learning-rate range test"),
        }
        for name, text in files.items():
            folder.write(name, text)
            tracker.log_text(name, text)
        lr = {key: f"{value:.3g}" for key, value in result["lr"].items()}
        said = (
            f"Learning-rate range test of `{run.preset}` on `{run.data}`. **The loss falls steepest at "
            f"{lr['suggestion']}**; rates from {lr['low']} to {lr['high']} are worth a sweep: "
            f"`jobs/tune.py {run.preset} --lr-bounds {storage.join(uri, FILE)} …`. "
            f"[The curve]({tracking.run_url(tracked, 'artifacts/lr_range.svg')})."
        )
        tracker.set_tags({tracking.NOTE: said} | {f"lr.{key}": value for key, value in lr.items()})
    return result | {"file": storage.join(uri, FILE), "plot": storage.join(uri, "lr_range.svg")}


def read_bounds(uri: str, preset: str, fingerprint: str | None) -> tuple[float, float]:
    """The lowest and the highest rate of a range test's file.

    Raises :class:`UsageError` for a file of another preset or none at all, and warns where the data was other.
    """
    found = storage.read_json(uri)
    try:
        low, high = float(found["lr"]["low"]), float(found["lr"]["high"])
    except (KeyError, TypeError, ValueError):
        low = high = math.nan
    if bounds_problem("loguniform", low, high):
        raise UsageError(f"--lr-bounds {uri}: is not the {FILE} of a range test; make one with jobs/lr_find.py")
    if found.get("preset") != preset:
        raise UsageError(f"--lr-bounds {uri}: is of preset {found.get('preset')!r}, not {preset!r}")
    if fingerprint is not None and found.get("fingerprint") != fingerprint:
        log.warning("--lr-bounds %s: the range test was made on other data", uri)
    return low, high


def analyse(rates: list[float], losses: list[float]) -> dict[str, float]:
    """The bounds and the suggestion of a curve.

    ``low`` is where the smoothed loss has done a tenth of its fall, ``high`` where it is lowest, ``suggestion`` where,
    between the two, it falls steepest along log(rate). Raises :class:`RunError` where it never falls.
    """
    if not losses:
        raise RunError("the loss was not finite at the first step; take a lower --lr-from")
    curve = smooth(losses)
    lowest = int(curve.argmin())
    fall = curve[0] - curve[lowest]
    begun = int(np.argmax(curve <= curve[0] - _BEGUN * fall))
    if fall <= 0 or lowest - begun < 2:
        raise RunError(
            f"the loss never fell: it was {curve[0]:.3f} at the rate {rates[0]:.1e} and {curve[-1]:.3f} at "
            f"{rates[-1]:.1e}; take more --steps, or another range with --lr-from and --lr-to"
        )
    slope = np.gradient(curve, np.log(rates))
    steepest = begun + int(slope[begun : lowest + 1].argmin())
    return {"low": rates[begun], "high": rates[lowest], "suggestion": rates[steepest]}


def smooth(losses: list[float]) -> NDArray[np.float64]:
    """Means over a window that is centred, so that nothing is shifted, and cut at the ends."""
    half = max(round(_SMOOTHED_SHARE * len(losses) / 2), 1)
    return np.array([np.mean(losses[max(i - half, 0) : i + half + 1]) for i in range(len(losses))])


def plot(points: list[dict[str, float]], lr: dict[str, float], title: str) -> str:
    """The curve with its bounds and suggestion, as SVG."""
    from matplotlib.figure import Figure  # seconds, once per machine

    rates, losses = [p["lr"] for p in points], [p["dialogue_loss"] for p in points]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(rates, losses, ".", markersize=3, color="#bbb", label="a step")
    axes.plot(rates, smooth(losses), color="#246", label="smoothed")
    axes.axvspan(lr["low"], lr["high"], color="#2a6", alpha=0.12, label=f"bounds {lr['low']:.1e} … {lr['high']:.1e}")
    axes.axvline(lr["suggestion"], color="#c52", label=f"steepest fall {lr['suggestion']:.1e}")
    top = max(losses[: len(losses) // 2])
    axes.set(xscale="log", xlabel="learning rate", ylabel="L_D (nats per target)", title=title)
    axes.set_ylim(min(losses) - 0.1, top + 0.5 * (top - min(losses)) + 0.1)
    axes.legend(frameon=False)
    text = io.StringIO()
    figure.savefig(text, format="svg")
    return text.getvalue()


def _run(config: LrFindConfig, scaling: ScalingConfig, uri: str) -> list[dict[str, float]]:
    try:
        outcome = workers.run(
            _worker, {"config": config}, scaling, uri, timeout_minutes=config.run.collective_timeout_minutes
        )
    except TrainingFailedError as error:
        log.error("%s", error)
        raise RunError(
            "the range test's workers failed (the failure is above); it is short, so start it again"
        ) from error
    finally:
        try:
            storage.delete(storage.join(uri, "ray"))
        except ArplusError as error:  # the range test's own end is to be heard, not this
            log.warning("Ray's own files are left in %s: %s", uri, error)
    if isinstance(outcome, Exception):
        raise outcome
    return cast(list[dict[str, float]], outcome)


def _worker(arguments: dict[str, Any]) -> list[dict[str, float]] | UsageError:
    # Here, since this module is also imported by jobs that have no engine.
    from arplus.study import lr_curve

    config: LrFindConfig = arguments["config"]
    return lr_curve.run(config)
