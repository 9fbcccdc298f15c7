#!/usr/bin/env python
"""A checkpoint for others, or the paper code's weights in our form: ``python jobs/export.py --checkpoint URI …``."""

import sys
from dataclasses import replace

from arplus import cli
from arplus.config import ExportConfig


def main() -> None:
    """Reads the command line, exports, and prints where the result is."""
    config = cli.parse(ExportConfig(), sys.argv[1:], prog="jobs/export.py")
    from arplus import tracking
    from arplus.runs.export import export

    with tracking.fetched(config.checkpoint or "", config.mlflow) as folder:
        print(export(replace(config, checkpoint=folder or None)))
    cli.conclude({"model": config.output, "next": cli.next_job("jobs/chat.py", checkpoint=config.output)})


if __name__ == "__main__":
    cli.run(main)
