"""Evaluates a checkpoint on a split: see ``--help`` for every setting."""

import sys

from arplus import cli, cluster, storage
from arplus.config import EvaluateConfig
from arplus.evaluation.evaluate import evaluate, table, track


def main() -> None:
    """Reads the command line, evaluates, and gives the metrics as table, JSON and in the training run's MLflow run."""
    config = cli.parse(EvaluateConfig(), sys.argv[1:], prog="jobs/evaluate.py", description=EvaluateConfig.__doc__)
    cluster.connect()
    result = evaluate(config)
    print(table(result))
    if config.json is not None:
        storage.write_json(config.json, result)
    track(result, config)


if __name__ == "__main__":
    cli.run(main)
