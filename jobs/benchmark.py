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
        print(f"usage: {PROG} SUBJECT [OPTIONS]\n\nMeasures one subject on this machine or cluster:\n")
        for name, (settings, _) in SUBJECTS.items():
            print(f"  {name:9} {settings.__doc__}")
        print(f"\n{PROG} SUBJECT --help lists the settings of a subject.")
        return
    if subject not in SUBJECTS:
        got = f" (got {subject!r})" if subject else ""
        raise UsageError(f"a subject is required: {PROG} SUBJECT …, one of {', '.join(SUBJECTS)}{got}")
    default, module = SUBJECTS[subject]
    settings = cli.parse(default, arguments, prog=f"{PROG} {subject}")
    from arplus.benchmark import figures, usage

    measure = importlib.import_module(f"arplus.benchmark.{module}").measure
    described = usage.describe()
    result = measure(settings)
    print(figures.text(described, result))
    figures.write(subject, settings, described, result)


if __name__ == "__main__":
    cli.run(main)
