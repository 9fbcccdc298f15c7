#!/usr/bin/env python
"""Turns raw records into an encoded data set: see ``--help`` for every setting."""

import sys

from arplus import cli, storage
from arplus.config import PrepareConfig


def main() -> None:
    """Reads the command line, prepares the data set, prints its counts, and says what to do next."""
    config = cli.parse(PrepareConfig(), sys.argv[1:], prog="jobs/prepare.py")
    from arplus.cluster import connection
    from arplus.prepare.card import report
    from arplus.prepare.pipeline import prepare

    connection.connect()
    manifest = prepare(config)
    print(report(manifest))
    connection.leave()
    runs = None if storage.is_local(config.output) else storage.beside(config.output, "runs")
    cli.conclude(
        {
            "data set": config.output,
            "data card": storage.join(config.output, "data_card.html"),
            "next": cli.next_job("jobs/train.py arplus", data=config.output, storage=runs),
        }
    )


if __name__ == "__main__":
    cli.run(main)
