"""Trains one of the paper's rows: ``python jobs/train.py PRESET [--tiny] [--config FILE] [--dry-run] [settings]``."""

import json
import sys

from arplus import cli
from arplus.cluster import connection
from arplus.training import estimate

PROG = "jobs/train.py"


def main() -> None:
    """Reads the command line and trains; with ``--dry-run`` prints what would be trained and starts nothing."""
    command = cli.train_command(sys.argv[1:], prog=PROG)
    if command.dry_run:
        print(estimate.report(command.config))
        return
    from arplus.training.trainer import train  # seconds of imports that --dry-run does without

    connection.connect()
    final = train(command.config)
    print(json.dumps(final.flat()))


if __name__ == "__main__":
    cli.run(main)
