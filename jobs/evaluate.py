"""Evaluates a checkpoint on a split: see ``--help`` for every setting."""

import sys

from arplus import cli
from arplus.config import EvaluateConfig


def main() -> None:
    """Reads the command line, evaluates, and gives the metrics as table, JSON and in the training run's MLflow run."""
    config = cli.parse(EvaluateConfig(), sys.argv[1:], prog="jobs/evaluate.py")
    from arplus.cluster import connection
    from arplus.evaluation.delivery import deliver, destination
    from arplus.evaluation.evaluate import evaluate, table

    to = destination(config)
    connection.connect()
    result = evaluate(config)
    print(table(result))
    deliver(result, config, to)


if __name__ == "__main__":
    cli.run(main)
