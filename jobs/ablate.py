#!/usr/bin/env python
"""Trains the paper's rows and makes its tables: ``python jobs/ablate.py --data URI [--tiny] [settings]``."""

import sys

from arplus import cli
from arplus.config import AblateConfig


def main() -> None:
    """Reads the command line and runs the study; with ``--dry-run`` prints what would be run and starts nothing."""
    command = cli.preset_command(
        sys.argv[1:],
        lambda run: AblateConfig(run=run),
        prog="jobs/ablate.py",
        description="Trains AR, AR+ and AR+ without each of its methods, and makes the paper's tables.",
        only="arplus",
    )
    from arplus.cluster import connection
    from arplus.study import ablate

    if command.dry_run:
        print(f"{ablate.plan(command.config)}\n{cli.submit_line('jobs/ablate.py', sys.argv[1:])}")
        return
    command.config.run.require_data()  # before Ray starts
    connection.connect()
    result = ablate.ablate(command.config)
    print(ablate.shown(result))
    data = command.config.run.data
    connection.leave()
    cli.conclude(
        {
            "report": result["report"],
            "checkpoint": result["checkpoint"],
            "model": result["model"],
            "MLflow": result["runs_url"],
            "compare": result["compare_url"],
            "served by": result["serve"],
            "next": cli.next_job("jobs/evaluate.py", checkpoint=result["checkpoint"], data=data),
        }
    )


if __name__ == "__main__":
    cli.run(main)
