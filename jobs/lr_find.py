#!/usr/bin/env python
"""Smith's learning-rate range test: ``python jobs/lr_find.py PRESET --data URI [--tiny] [settings]``."""

import sys
from dataclasses import replace

from arplus import cli
from arplus.config import LrFindConfig


def main() -> None:
    """Reads the command line, runs the test, and says which rates are worth a sweep."""
    command = cli.preset_command(
        sys.argv[1:],
        lambda run: LrFindConfig(run=run),
        prog="jobs/lr_find.py",
        description="A learning-rate range test: trains with a rate that grows from step to step, and says where the "
        "loss falls.",
    )
    if command.dry_run:
        from arplus.training.estimate import report

        run = replace(command.config.run, max_steps=command.config.steps)
        print(report(run, command.config), cli.submit_line("jobs/lr_find.py", sys.argv[1:]), sep="\n")
        return
    run = command.config.run
    run.require_data()  # before Ray starts
    from arplus.cluster import connection
    from arplus.study import lr_find

    connection.connect()
    result = lr_find.find(command.config)
    lr = result["lr"]
    print(f"learning rate: {lr['suggestion']:.2e}, where the loss falls steepest after {len(result['points'])} steps")
    print(f"bounds for a sweep: {lr['low']:.2e} … {lr['high']:.2e}")
    connection.leave()
    cli.conclude(
        {
            "curve": result["plot"],
            "MLflow": result["mlflow_url"],
            "next": cli.next_job(
                f"jobs/tune.py {result['preset']}",
                tiny=command.tiny,
                data=run.data,
                storage=run.storage,
                mlflow=run.mlflow,
                lr_bounds=result["file"],
            ),
        }
    )


if __name__ == "__main__":
    cli.run(main)
