"""What a benchmark found: a table to read, JSON to compare, and an MLflow run."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arplus import storage, tracking
from arplus.benchmark.options import Output
from arplus.config import flat

NOT_INSTALLED = "not installed (make benchmark-deps)"


@dataclass(kw_only=True)
class Result:
    """One subject's figures."""

    figures: dict[str, float | None]
    """By the name that the JSON has; None where it could not be measured."""
    table: list[tuple[str, str]] = field(default_factory=list)
    """Lines to read: what was measured, and the figure or why there is none."""


def text(machine: dict[str, Any], result: Result) -> str:
    """The machine and the result as a table."""
    lines = [*((name, str(value)) for name, value in machine.items()), ("", ""), *result.table]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}".rstrip() for name, value in lines)


def write(subject: str, settings: Output, machine: dict[str, Any], result: Result) -> None:
    """Writes the JSON file and the MLflow run where they are asked for."""
    if settings.json is not None:
        storage.write_json(settings.json, {"machine": machine, subject: result.figures})
    if settings.mlflow is not None:
        tags = {name: str(value) for name, value in machine.items()}
        run = tracking.start_run(settings.mlflow, settings.experiment, subject, tags=tags, params=flat(settings))
        figures = {f"{subject}/{name}": value for name, value in result.figures.items() if value is not None}
        with (
            tempfile.TemporaryDirectory() as folder,
            tracking.Tracker(run, record=Path(folder, "tracking.jsonl")) as tracker,
        ):
            tracker.log(figures | {"machine/matmul_gflops": machine["matmul_gflops"]}, step=0)
            tracker.log_text(f"{subject}.txt", text(machine, result) + "\n")


def rate(value: float) -> str:
    """A rate for the table."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def size(value: float) -> str:
    """Bytes for the table."""
    return f"{value / 2**20:,.0f} MiB"
