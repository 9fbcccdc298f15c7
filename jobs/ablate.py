"""Trains the paper's rows and makes its tables: ``python jobs/ablate.py --data URI [--tiny] [settings]``."""

import sys
from dataclasses import replace

from arplus import cli, tracking
from arplus.cluster import connection
from arplus.config import PRESETS, AblateConfig, TrainConfig, study_settings

PROG = "jobs/ablate.py"


def main() -> None:
    """Reads the command line and runs the study; with ``--dry-run`` prints what would be run and starts nothing."""
    command = cli.preset_command(
        sys.argv[1:],
        _widen,
        prog=PROG,
        description="Trains AR, AR+ and AR+ less each method, and makes the paper's tables.",
        only="arplus",
    )
    from arplus.study import ablate  # seconds of imports that --help does without
    from arplus.study.record import resolve_study

    if command.dry_run:
        print(ablate.plan(command.config))
        return
    connection.connect()
    print(ablate.shown(ablate.ablate(command.config)))
    if serve := tracking.open_command(resolve_study(command.config, "ablate").mlflow or ""):
        print(f"see the runs with: {serve}")


def _widen(run: TrainConfig) -> AblateConfig:
    config: AblateConfig = study_settings(AblateConfig, run)
    return replace(config, tiny=run != PRESETS["arplus"])


if __name__ == "__main__":
    cli.run(main)
