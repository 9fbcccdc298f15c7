"""``python -m arplus.tracking replay RECORD --mlflow URI``."""

import argparse
import os
import sys

from arplus import cli
from arplus.errors import UserError, redacted
from arplus.tracking.replay import replay


def main() -> None:
    """Sends what an MLflow server missed, and says how much that was."""
    parser = argparse.ArgumentParser(prog="python -m arplus.tracking", description="Fills an MLflow server in.")
    command = parser.add_subparsers(required=True, metavar="replay").add_parser(
        "replay", help="send what the server missed, from the record of a run"
    )
    command.add_argument("record", help="JSONL record of a run, or a folder of records: a path or s3:// URI")
    command.add_argument("--mlflow", metavar="URI", help="tracking URI; by default MLFLOW_TRACKING_URI")
    arguments = parser.parse_args()
    uri = arguments.mlflow or os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise UserError("--mlflow: is required where MLFLOW_TRACKING_URI is not set")
    sent = replay(arguments.record, uri)
    sys.stdout.write(f"{sent} values sent to MLflow at {redacted(uri)}\n")


if __name__ == "__main__":
    cli.run(main)
