"""Fills a server in from a record: what it missed is sent, what it has is not sent twice."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arplus import storage
from arplus.tracking.client import METRICS_A_REQUEST, Event, connect, digest, explained, send
from arplus.tracking.run import absolute_uri

logger = logging.getLogger(__name__)


def read_record(path: str | Path) -> Iterator[Event]:
    """The events of a record, or of all records in a folder; ``path`` may be a URI.

    Lines that are none (a process was killed while writing) are counted in a warning. Raises :class:`UserError` where
    there is nothing.
    """
    broken = 0
    for uri in storage.list_files(str(path)):
        for line in storage.read_bytes(uri).decode(errors="replace").split("\n"):
            try:
                event = json.loads(line)
            except ValueError:
                event = None
            if isinstance(event, dict) and "run_id" in event and "timestamp" in event:
                yield event
            else:
                broken += bool(line.strip())
    if broken:
        logger.warning("%s: %d broken lines skipped", path, broken)


def replay(path: str | Path, uri: str) -> int:
    """Sends whatever of a record the server lacks, and gives the number of events sent; a second call sends nothing.

    Raises :class:`ResourceError` for a server that does not answer or does not know the run.
    """
    uri = absolute_uri(uri)
    client = connect(uri)
    runs: dict[str, list[Event]] = {}
    for event in sorted(read_record(path), key=lambda event: event["timestamp"]):
        runs.setdefault(event["run_id"], []).append(event)
    with explained(uri):
        return sum(_replay_run(client, run_id, events) for run_id, events in runs.items())


def _replay_run(client: Any, run_id: str, events: list[Event]) -> int:
    run = client.get_run(run_id)
    keys = {e["key"] for e in events if "key" in e}
    there = [(key, m) for key in sorted(keys) for m in client.get_metric_history(run_id, key)]
    points = {(key, m.step) for key, m in there}
    # A step that was trained again after a restart is recorded again; one point of it is enough.
    recorded = {(e["key"], e["step"]): e for e in events if "key" in e}
    metrics = [e for point, e in recorded.items() if point not in points]
    for start in range(0, len(metrics), METRICS_A_REQUEST):
        send(client, metrics[start : start + METRICS_A_REQUEST])

    tags = {e["tag"]: e for e in events if "tag" in e}
    rest = [e for tag, e in tags.items() if run.data.tags.get(tag) != e["value"]]
    artifacts = {_artifact(e): e for e in events if "artifact" in e}
    rest += [e for name, e in artifacts.items() if not _has_artifact(client, run_id, name)]
    digests = {d.dataset.digest for d in run.inputs.dataset_inputs}
    datasets = {digest(e["dataset"]["fingerprint"]): e for e in events if "dataset" in e}
    rest += [e for digest, e in datasets.items() if digest not in digests]
    # A run that went on elsewhere after this record ended it is none of this record's business.
    latest = max((m.timestamp for _, m in there), default=0)
    ends = [e for e in events[-1:] if "status" in e and e["timestamp"] >= latest]
    rest += [e for e in ends if run.info.status != e["status"]]
    sent = len(metrics)
    for event in rest:
        if "file" in event and not Path(event["file"]).exists():
            logger.warning("%s is gone: not sent", event["file"])
        else:
            send(client, [event])
            sent += 1
    return sent


def _artifact(event: Event) -> str:
    if "text" in event:
        return str(event["artifact"])
    return "/".join(filter(None, (event["artifact"], Path(event["file"]).name)))


def _has_artifact(client: Any, run_id: str, name: str) -> bool:
    folder = name.rpartition("/")[0] or None
    return any(found.path == name for found in client.list_artifacts(run_id, folder))
