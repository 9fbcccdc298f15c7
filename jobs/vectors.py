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
    width = None if config.size == VectorsConfig.size else config.size
    flags = {"data": config.data, "init.character_vectors": config.output, "model.embedding_size": width}
    cli.conclude({"vectors": config.output, "next": cli.next_job("jobs/train.py arplus", **flags)})


if __name__ == "__main__":
    cli.run(main)
