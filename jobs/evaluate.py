#!/usr/bin/env python
"""Evaluates a checkpoint on a split: see ``--help`` for every setting."""

import sys

from arplus import cli
from arplus.config import EvaluateConfig


def main() -> None:
    """Reads the command line, evaluates, and gives the metrics as table, JSON and in the training run's MLflow run."""
    config = cli.parse(EvaluateConfig(), sys.argv[1:], prog="jobs/evaluate.py")
    from arplus import tracking
    from arplus.cluster import connection, placement
    from arplus.evaluation.delivery import deliver, destination
    from arplus.evaluation.evaluate import evaluate, table

    to = destination(config)
    connection.connect()
    placement.say_who_qualifies(config.placement)
    result = evaluate(config)
    print(table(result))
    page = deliver(result, config, to)
    connection.leave()
    cli.conclude(
        {
            "checkpoint": result["checkpoint"],
            "metrics": config.json,
            "replies": config.replies,
            "MLflow": page,
            "served by": tracking.open_command(to.mlflow),
            "next": cli.next_job("jobs/chat.py", checkpoint=config.checkpoint, mlflow=config.mlflow, say="你好"),
        }
    )


if __name__ == "__main__":
    cli.run(main)
