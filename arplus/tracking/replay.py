"""Fills a server in from a record: what it missed is sent, what it has is not sent twice, nothing holds up the rest."""

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from arplus import storage
from arplus.errors import ResourceError
from arplus.tracking.client import METRICS_A_REQUEST, connect, digest, send
from arplus.tracking.refusal import (
    Event,
    Refused,
    advice,
    artifact_path,
    brief,
    is_final,
    kind_of,
    send_each,
    titles,
)
from arplus.tracking.run import absolute_uri

logger = logging.getLogger(__name__)

T = TypeVar("T")


def read_record(path: str | Path) -> Iterator[Event]:
    """The events of a record, or of all records in a folder; ``path`` may be a URI.

    Broken lines (a process was killed while writing) are counted in a warning. Raises :class:`UsageError` where
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

    What the server refuses, or what is no longer there to be sent, is passed over. Raises :class:`UnsentError` at the
    end where there was such, and :class:`ResourceError` for a server that does not answer.
    """
    uri = absolute_uri(uri)
    client = connect(uri)
    runs: dict[str, list[Event]] = {}
    for event in sorted(read_record(path), key=lambda event: event["timestamp"]):
        runs.setdefault(event["run_id"], []).append(event)
    outcome = _Outcome(client, uri)
    for run_id, events in runs.items():
        outcome.send_values(run_id, events)
    for run_id, events in runs.items():  # files, which take long, when everything else has arrived
        outcome.send_artifacts(run_id, events)
    if outcome.refused:
        raise UnsentError(outcome.sent, outcome.refused)
    return outcome.sent


class UnsentError(ResourceError):
    """Of a record some values were not sent: the message says how many, which and why, by the kind of the reason."""

    def __init__(self, sent: int, refused: Refused) -> None:
        self.sent = sent
        kinds: dict[str, Refused] = {}
        for event, error in refused:
            kinds.setdefault(kind_of(error), []).append((event, error))
        reasons = []
        for found in kinds.values():
            events, error = [event for event, _ in found], found[0][1]
            reasons.append(f"{len(events)} ({titles(events)}): {brief(error)}; {advice(error)}")
        super().__init__(f"{len(refused)} values could not be sent, and stay in the record\n  " + "\n  ".join(reasons))


class _Outcome:
    """What became of a record's events so far."""

    def __init__(self, client: Any, uri: str) -> None:
        self.client = client
        self.uri = uri
        self.sent = 0
        self.refused: Refused = []

    def send_values(self, run_id: str, events: list[Event]) -> None:
        """Sends all but the artifacts, the status first."""
        values = [event for event in events if "artifact" not in event]
        missing = self._tried(values, partial(_missing, self.client, run_id, events)) or []
        batches = [[event] for event in missing if "key" not in event]
        metrics = [event for event in missing if "key" in event]
        batches += [metrics[i : i + METRICS_A_REQUEST] for i in range(0, len(metrics), METRICS_A_REQUEST)]
        for batch in batches:
            self._send(batch)

    def send_artifacts(self, run_id: str, events: list[Event]) -> None:
        """Sends the artifacts that the run lacks."""
        for name, event in {artifact_path(e): e for e in events if "artifact" in e}.items():
            if self._tried([event], partial(_has_artifact, self.client, run_id, name)) is False:
                self._send([event])

    def _send(self, events: list[Event]) -> None:
        refused = self._tried(events, partial(send_each, events, partial(send, self.client)))
        if refused is not None:
            self.refused += refused
            self.sent += len(events) - len(refused)

    def _tried(self, events: list[Event], work: Callable[[], T]) -> T | None:
        """The result of ``work`` for these events; None where it failed.

        Raises :class:`ResourceError` where that is because the server has gone away.
        """
        try:
            return work()
        except Exception as error:  # whatever a server or an artifact store may do, the others are sent
            if not is_final(error):
                connect(self.uri)
            self.refused += [(event, error) for event in events]
            return None


def _missing(client: Any, run_id: str, events: list[Event]) -> list[Event]:
    """Of a run's events but its artifacts, those that the server lacks; the status comes first."""
    run = client.get_run(run_id)
    keys = {e["key"] for e in events if "key" in e}
    there = [(key, m) for key in sorted(keys) for m in client.get_metric_history(run_id, key)]
    points = {(key, m.step) for key, m in there}
    # A run that went on elsewhere after this record ended it does not concern this record.
    latest = max((m.timestamp for _, m in there), default=0)
    ends = [e for e in events[-1:] if "status" in e and e["timestamp"] >= latest]
    found = [e for e in ends if run.info.status != e["status"]]
    tags = {e["tag"]: e for e in events if "tag" in e}
    found += [e for tag, e in tags.items() if run.data.tags.get(tag) != e["value"]]
    digests = {d.dataset.digest for d in run.inputs.dataset_inputs}
    datasets = {digest(e["dataset"]["fingerprint"]): e for e in events if "dataset" in e}
    found += [e for digest, e in datasets.items() if digest not in digests]
    # A step that was trained again after a restart is recorded again; one point of it is enough.
    recorded = {(e["key"], e["step"]): e for e in events if "key" in e}
    return found + [e for point, e in recorded.items() if point not in points]


def _has_artifact(client: Any, run_id: str, name: str) -> bool:
    """Whether a run has an artifact; one that may not be asked for is taken to be missing, and sent again."""
    folder = name.rpartition("/")[0] or None
    try:
        return any(found.path == name for found in client.list_artifacts(run_id, folder))
    except Exception as error:
        if not is_final(error):
            raise
        return False
