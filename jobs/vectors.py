"""Trains character vectors on a prepared data set's text: see ``--help`` for every setting."""

import sys

from arplus import cli
from arplus.config import VectorsConfig


def main() -> None:
    """Reads the command line, trains, writes the vectors, and prints where they are."""
    config = cli.parse(VectorsConfig(), sys.argv[1:], prog="jobs/vectors.py")
    from arplus.pretrained.word2vec import make_vectors

    print(make_vectors(config))


if __name__ == "__main__":
    cli.run(main)
