#!/usr/bin/env python
"""Trains character vectors on a prepared data set's text: see ``--help`` for every setting."""

import sys

from arplus import cli
from arplus.config import VectorsConfig


def main() -> None:
    """Reads the command line, trains, writes the vectors, and says what to do next."""
    config = cli.parse(VectorsConfig(), sys.argv[1:], prog="jobs/vectors.py")
    from arplus.pretrained.word2vec import make_vectors

    print(make_vectors(config))
    width = "" if config.size == VectorsConfig.size else f" --model.embedding-size {config.size}"
    start = f"python jobs/train.py arplus --data {config.data} --init.character-vectors {config.output}{width}"
    cli.conclude({"vectors": config.output, "next": start})


if __name__ == "__main__":
    cli.run(main)
