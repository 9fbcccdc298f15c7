"""Measures one subject on this machine or cluster: ``python jobs/benchmark.py SUBJECT [settings]``."""

import sys
from typing import Any

from arplus import cli
from arplus.benchmark import data, faults, generate, machine, prepare, report, scale, train
from arplus.cluster import connection
from arplus.errors import UsageError

PROG = "jobs/benchmark.py"
SUBJECTS: dict[str, tuple[Any, Any]] = {
    "train": (train.TrainBenchmark(), train.measure),
    "generate": (generate.GenerateBenchmark(), generate.measure),
    "scale": (scale.ScaleBenchmark(), scale.measure),
    "data": (data.DataBenchmark(), data.measure),
    "prepare": (prepare.PrepareBenchmark(), prepare.measure),
    "faults": (faults.FaultsBenchmark(), faults.measure),
}
"""What can be measured: its settings, and the function that measures it."""


def main() -> None:
    """Reads the command line, measures, prints the table and writes what is asked for."""
    subject, *arguments = sys.argv[1:] or [""]
    if subject in ("-h", "--help"):
        print(f"{PROG} SUBJECT [settings]; {PROG} SUBJECT --help\nSUBJECT is one of {', '.join(SUBJECTS)}")
        return
    if subject not in SUBJECTS:
        raise UsageError(f"{PROG} SUBJECT …: SUBJECT must be one of {', '.join(SUBJECTS)} (got {subject!r})")
    default, measure = SUBJECTS[subject]
    settings = cli.parse(default, arguments, prog=f"{PROG} {subject}", description=type(default).__doc__)
    described = machine.describe()
    connection.connect()
    result = measure(settings)
    print(report.text(described, result))
    report.write(subject, settings, described, result)


if __name__ == "__main__":
    cli.run(main)
