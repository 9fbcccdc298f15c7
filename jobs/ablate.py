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
        description="Trains AR, AR+ and AR+ less each method, and makes the paper's tables.",
        only="arplus",
    )
    from arplus import tracking
    from arplus.cluster import connection
    from arplus.study import ablate
    from arplus.study.record import resolve_study

    if command.dry_run:
        print(ablate.plan(command.config))
        return
    connection.connect()
    print(ablate.shown(ablate.ablate(command.config)))
    if serve := tracking.open_command(resolve_study(command.config, "ablate").run.mlflow or ""):
        print(f"see the runs with: {serve}")


if __name__ == "__main__":
    cli.run(main)
