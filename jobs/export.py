#!/usr/bin/env python
"""A checkpoint for others, or the paper code's weights in our form: ``python jobs/export.py --checkpoint URI …``."""

import sys

from arplus import cli
from arplus.config import ExportConfig


def main() -> None:
    """Reads the command line, exports, and prints where the result is."""
    config = cli.parse(ExportConfig(), sys.argv[1:], prog="jobs/export.py")
    from arplus.runs.export import export

    print(export(config))
    cli.conclude({"model": config.output, "next": f"python jobs/chat.py --checkpoint {config.output}"})


if __name__ == "__main__":
    cli.run(main)
