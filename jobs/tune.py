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
        description="Searches the best settings of a training run by its response perplexity on validation.",
    )
    from arplus.cluster import connection
    from arplus.study import tune

    if command.dry_run:
        print(tune.plan(command.config))
        return
    connection.connect()
    result = tune.sweep(command.config)
    print(f"best: {result['best']}, response PPL {result['response_ppl']:.3f}")
    print("\n".join(f"  --{name} {value}" for name, value in result["values"].items()))
    print(f"train with it: jobs/train.py --config {result['config']}")
    if result["model"]:
        print(f"its model: {result['model']}")
    if result["serve"]:
        print(f"see the runs with: {result['serve']}")
    print(f"runs: {result['runs_url']}\ncompare: {result['compare_url']}")


if __name__ == "__main__":
    cli.run(main)
