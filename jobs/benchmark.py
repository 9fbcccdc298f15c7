"""Measures one subject on this machine or cluster: ``python jobs/benchmark.py SUBJECT [settings]``."""

import importlib
import sys

from arplus import cli
from arplus.benchmark.settings import SUBJECTS
from arplus.errors import UsageError

PROG = "jobs/benchmark.py"


def main() -> None:
    """Reads the command line, measures, prints the table and writes what is asked for."""
    subject, *arguments = sys.argv[1:] or [""]
    if subject in ("-h", "--help"):
        print(f"{PROG} SUBJECT [settings]; {PROG} SUBJECT --help\nSUBJECT is one of {', '.join(SUBJECTS)}")
        return
    if subject not in SUBJECTS:
        raise UsageError(f"{PROG} SUBJECT …: SUBJECT must be one of {', '.join(SUBJECTS)} (got {subject!r})")
    settings = cli.parse(SUBJECTS[subject](), arguments, prog=f"{PROG} {subject}")
    from arplus.benchmark import machine, report
    from arplus.cluster import connection

    measure = importlib.import_module(f"arplus.benchmark.{subject}").measure
    described = machine.describe()
    connection.connect()
    result = measure(settings)
    print(report.text(described, result))
    report.write(subject, settings, described, result)


if __name__ == "__main__":
    cli.run(main)
