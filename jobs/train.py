#!/usr/bin/env python
"""Trains AR, AR+ or another preset: ``python jobs/train.py PRESET [--tiny] [--config FILE] [--dry-run] [settings]``."""

import json
import sys

from arplus import cli


def main() -> None:
    """Reads the command line and trains; with ``--dry-run`` prints what would be trained and starts nothing."""
    command = cli.train_command(sys.argv[1:], prog="jobs/train.py")
    if command.dry_run:
        from arplus.training import estimate

        print(f"{estimate.report(command.config)}\n{cli.submit_line('jobs/train.py', sys.argv[1:])}")
        return
    command.config.require_data()  # before Ray starts
    from arplus.cluster import connection
    from arplus.training.trainer import summarise, train

    connection.connect()
    final = train(command.config)
    print(json.dumps(final.flat()))
    connection.leave()
    cli.conclude(summarise(command.config, final))


if __name__ == "__main__":
    cli.run(main)
