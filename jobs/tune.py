#!/usr/bin/env python
"""Searches settings for a training run: ``python jobs/tune.py PRESET --data URI --trials N [--tiny] [settings]``."""

import sys

from arplus import cli
from arplus.config import TuneConfig


def main() -> None:
    """Reads the command line and searches; with ``--dry-run`` prints what would be tried and starts nothing."""
    command = cli.preset_command(
        sys.argv[1:],
        lambda run: TuneConfig(run=run),
        prog="jobs/tune.py",
        description="Searches settings of a training run; the best has the lowest response perplexity on validation.",
    )
    from arplus.cluster import connection
    from arplus.study import tune

    if command.dry_run:
        print(f"{tune.plan(command.config)}\n{cli.submit_line('jobs/tune.py', sys.argv[1:])}")
        return
    command.config.run.require_data()  # before Ray starts
    connection.connect()
    result = tune.sweep(command.config)
    print(f"best: {result['best']}, response PPL {result['response_ppl']:.3f}")
    print("\n".join(f"  --{name} {value}" for name, value in result["values"].items()))
    connection.leave()
    cli.conclude(
        {
            "checkpoint": result["checkpoint"],
            "model": result["model"],
            "MLflow": result["runs_url"],
            "compare": result["compare_url"],
            "served by": result["serve"],
            "next": cli.next_job("jobs/train.py", config=result["config"]),
        }
    )


if __name__ == "__main__":
    cli.run(main)
