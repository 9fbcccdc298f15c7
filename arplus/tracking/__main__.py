"""``python -m arplus.tracking replay RECORD --mlflow URI``.

Exit codes: 0 all is there, 2 the user's error, 3 the server does not answer, or does not take some of the values.
"""

import argparse
import os
import sys

from arplus import cli
from arplus.errors import UsageError, redact
from arplus.tracking.replay import UnsentError, replay


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
        raise UsageError("--mlflow: is required where MLFLOW_TRACKING_URI is not set")
    try:
        sent, unsent = replay(arguments.record, uri), None
    except UnsentError as error:
        sent, unsent = error.sent, error
    sys.stdout.write(f"{sent} values sent to MLflow at {redact(uri)}\n")
    sys.stdout.flush()
    if unsent is not None:
        raise unsent


if __name__ == "__main__":
    cli.run(main)
