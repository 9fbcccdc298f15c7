#!/usr/bin/env python
"""Generates records in PersonalDialog's raw form: see ``--help`` for every setting."""

import dataclasses
import json
import sys

from arplus import cli, storage
from arplus.config import SynthesizeConfig


def main() -> None:
    """Reads the command line, writes the records, prints what was written."""
    config = cli.parse(SynthesizeConfig(), sys.argv[1:], prog="jobs/synthesize.py")
    from arplus.synthetic.write import synthesize

    counts = synthesize(config)
    print(json.dumps({"output": config.output, **dataclasses.asdict(counts)}))
    prepare = cli.next_job("jobs/prepare.py", input=config.output, output=storage.beside(config.output, "data"))
    cli.conclude({"records": config.output, "next": prepare})


if __name__ == "__main__":
    cli.run(main)
