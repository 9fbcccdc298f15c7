#!/usr/bin/env python
"""Measures one subject on this machine or cluster: ``python jobs/benchmark.py SUBJECT [settings]``."""

import importlib
import sys

from arplus import cli
from arplus.benchmark import options
from arplus.errors import UsageError

PROG = "jobs/benchmark.py"
SUBJECTS: dict[str, tuple[options.Output, str]] = {
    "train": (options.TrainBenchmark(), "step_speed"),
    "generate": (options.GenerateBenchmark(), "reply_speed"),
    "scale": (options.ScaleBenchmark(), "scaling"),
    "data": (options.DataBenchmark(), "feed_speed"),
    "prepare": (options.PrepareBenchmark(), "prepare_speed"),
    "faults": (options.FaultsBenchmark(), "recovery"),
}
"""What can be measured: its settings, and the module that measures it."""


def main() -> None:
    """Reads the command line, measures, prints the table and writes what is asked for."""
    subject, *arguments = sys.argv[1:] or [""]
    if subject in ("-h", "--help"):
        print(f"{PROG} SUBJECT [settings]; {PROG} SUBJECT --help\nSUBJECT is one of {', '.join(SUBJECTS)}")
        return
    if subject not in SUBJECTS:
        raise UsageError(f"{PROG} SUBJECT …: SUBJECT must be one of {', '.join(SUBJECTS)} (got {subject!r})")
    default, module = SUBJECTS[subject]
    settings = cli.parse(default, arguments, prog=f"{PROG} {subject}")
    from arplus.benchmark import figures, usage
    from arplus.cluster import connection

    measure = importlib.import_module(f"arplus.benchmark.{module}").measure
    described = usage.describe()
    connection.connect()
    result = measure(settings)
    print(figures.text(described, result))
    figures.write(subject, settings, described, result)


if __name__ == "__main__":
    cli.run(main)
