"""Fills a server in from a record: what it missed is sent, what it has is not sent twice, nothing holds up the rest.

Points are told apart by their step, tags by their value, artifacts by their content. Where the run has gone on
elsewhere since the record ended, a tag or an artifact that it has is newer than the record's, and stays.
"""

import filecmp
import json
import logging
import os
import tempfile
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
        self.newer: set[str] = set()
        """Runs that have gone on elsewhere since the record ended."""

    def send_values(self, run_id: str, events: list[Event]) -> None:
        """Sends all but the artifacts, the status first."""
        values = [event for event in events if "artifact" not in event]
        missing, newer = self._tried(values, partial(_missing, self.client, run_id, events)) or ([], False)
        if newer:
            self.newer.add(run_id)
        batches = [[event] for event in missing if "key" not in event]
        metrics = [event for event in missing if "key" in event]
        batches += [metrics[i : i + METRICS_A_REQUEST] for i in range(0, len(metrics), METRICS_A_REQUEST)]
        for batch in batches:
            self._send(batch)

    def send_artifacts(self, run_id: str, events: list[Event]) -> None:
        """Sends the artifacts that the run lacks, or has as they were before."""
        for event in {artifact_path(e): e for e in events if "artifact" in e}.values():
            if self._tried([event], partial(_has_artifact, self.client, run_id, event, run_id in self.newer)) is False:
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


def _missing(client: Any, run_id: str, events: list[Event]) -> tuple[list[Event], bool]:
    """Of a run's events but its artifacts, those that the server lacks, the status first; and whether the run is newer.

    It is where it went on elsewhere after this record ended: then what it has by a name is newer than the record's.
    """
    run = client.get_run(run_id)
    keys = {e["key"] for e in events if "key" in e}
    there = [(key, m) for key in sorted(keys) for m in client.get_metric_history(run_id, key)]
    newer = max((m.timestamp for _, m in there), default=0) > events[-1]["timestamp"]
    found = [e for e in events[-1:] if "status" in e and not newer and run.info.status != e["status"]]
    tags = {e["tag"]: e for e in events if "tag" in e}
    found += [
        e for tag, e in tags.items() if not (newer and tag in run.data.tags) and run.data.tags.get(tag) != e["value"]
    ]
    digests = {d.dataset.digest for d in run.inputs.dataset_inputs}
    datasets = {digest(e["dataset"]["fingerprint"]): e for e in events if "dataset" in e}
    found += [e for digest, e in datasets.items() if digest not in digests]
    # A step that was trained again after a restart is recorded again; one point of it is enough.
    recorded = {_point(e): e for e in events if "key" in e}
    points = {(key, m.step) for key, m in there} | {(key, m.step, m.timestamp) for key, m in there}
    return found + [e for point, e in recorded.items() if point not in points], newer


def _point(event: Event) -> tuple[Any, ...]:
    """What tells a metric's points apart: the step, and where steps repeat, as those of evaluations, when it was."""
    point = (event["key"], event["step"])
    return (*point, event["timestamp"]) if event.get("repeats") else point


def _has_artifact(client: Any, run_id: str, event: Event, newer: bool) -> bool:
    """Whether a run has an artifact as it was logged, or a newer one of its name.

    One that may not be asked for is taken to be missing, and sent again.
    """
    name, file = artifact_path(event), event.get("file")
    try:
        there = {
            found.path: found.file_size for found in client.list_artifacts(run_id, name.rpartition("/")[0] or None)
        }
        # Of a file that is no longer here nothing more can be known, nor sent.
        if name not in there or newer or (file and not os.path.exists(file)):
            return name in there
        mine = os.path.getsize(file) if file else len(event["text"].encode())
        if there[name] not in (None, mine):
            return False
        with tempfile.TemporaryDirectory(prefix="arplus-replay-") as copies:
            copy = Path(client.download_artifacts(run_id, name, copies))
            return filecmp.cmp(copy, file, shallow=False) if file else copy.read_bytes() == event["text"].encode()
    except Exception as error:
        if not is_final(error):
            raise
        return False
