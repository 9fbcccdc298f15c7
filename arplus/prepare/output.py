"""The output of a preparation: whose it is, and how it is committed.

Files of examples have names of their own preparation; the vocabularies and the card follow, then the manifest. So a
folder with a manifest is whole, and one without is not a data set, whenever and however the job ends.
"""

import logging
import re
from collections import defaultdict

from arplus import storage
from arplus.data import manifest
from arplus.data.manifest import Manifest
from arplus.errors import ArplusError, UsageError
from arplus.prepare import card
from arplus.prepare.card import DataCard
from arplus.prepare.lease import FILE as LEASE
from arplus.prepare.lease import Lease, is_unfinished
from arplus.prepare.tasks import write
from arplus.text import Vocabulary

STAGING = "_temporary"
"""Folder below the output that holds unfinished work."""

_PART = re.compile(r"[^/]+/part-\d{5}-[0-9a-f]{8}\.parquet")
"""A preparation's examples, in a split of any name, below the output."""
_OURS = re.compile(
    rf"{_PART.pattern}|vocabulary/(characters|persona_words)\.txt|rejects/\d+-\d+-[0-9a-f]{{8}}\.jsonl\.gz"
    rf"|{STAGING}/.*|{re.escape(card.JSON)}|{re.escape(card.PAGE)}"
)
"""All that a preparation leaves below the output beside lease and manifest."""
_TEMPORARY = re.compile(r"(^|/)\.([^/]+)\.[0-9a-f]{8}\.tmp$")
"""What a file is called until it is whole."""
_BEGUN = re.compile(rf"\.{re.escape(LEASE)}\.(lock|held|[0-9a-f]{{8}}\.tmp)")
"""What is left of a lease whose job was killed while it wrote it."""

log = logging.getLogger(__name__)


def claim(output: str) -> Lease:
    """Makes the output ours: what an unfinished preparation left is removed, whatever its evaluation sets were.

    Raises :class:`UsageError` where the output holds anything and no preparation began there.
    """
    whole = storage.join(output, manifest.FILE)
    taken = UsageError(f"{output}: holds a prepared data set; choose another --output or delete it first")
    if storage.exists(whole):
        raise taken
    unfinished = is_unfinished(output)
    found = storage.list_files(output) if not unfinished and storage.exists(output) else []
    if not all(_BEGUN.fullmatch(file.removeprefix(f"{output}/")) for file in found):
        raise UsageError(f"{output}: is not empty, and it is not an unfinished data set; choose another --output")
    lease = Lease.take(output)
    for file in found:  # by now no other job writes there; the lock went with our own use of it
        if file.endswith(".tmp"):
            storage.delete(file)
    if storage.exists(whole):  # since we looked
        lease.release(finished=True)
        raise taken
    if unfinished:
        log.info("removing what an unfinished preparation left in %s", output)
        _clear(output)
    return lease


def _clear(output: str) -> None:
    found = defaultdict(list)
    for file in storage.list_files(output):
        path = file.removeprefix(f"{output}/")
        found[path.partition("/")[0]].append(path)
    for top, paths in found.items():
        ours = [path for path in paths if _is(_OURS, path)]
        for path in [top] if len(ours) == len(paths) else ours:  # a folder of thousands at once
            storage.delete(storage.join(output, path))


def _is(kind: re.Pattern[str], path: str) -> bool:
    return kind.fullmatch(_TEMPORARY.sub(r"\1\2", path)) is not None


def _unstage(output: str, lease: Lease) -> None:
    """Deletes what this preparation staged; another one's stays, for it may be our successor's."""
    staging = storage.join(output, STAGING)
    storage.delete(storage.join(staging, lease.token))
    if storage.exists(staging) and not storage.list_files(staging):
        storage.delete(staging)


def _delete_others(output: str, found: Manifest) -> None:
    """Deletes the examples that are not of this preparation."""
    ours = {file.path for split in found.splits.values() for file in split.files}
    for folder in found.splits:
        uri = storage.join(output, folder)
        for file in storage.list_files(uri) if storage.exists(uri) else []:
            path = file.removeprefix(f"{output}/")
            if path not in ours and _is(_PART, path):
                storage.delete(file)


def leave(output: str, lease: Lease, finished: bool) -> None:
    """Gives the output back; a failed preparation leaves its rejects, and the mark that it is unfinished."""
    try:
        try:
            if not finished:
                lease.check()
                _unstage(output, lease)
        finally:
            lease.release(finished=finished)
    except ArplusError as error:  # what made the preparation fail is the better message; a finished one is whole
        log.warning("%s: could not be tidied up (%s)", output, error)


def commit(
    output: str, lease: Lease, found: Manifest, facts: DataCard, characters: Vocabulary, persona_words: Vocabulary
) -> None:
    """Writes all that is not examples, the manifest last; and removes what others left while we worked."""
    lease.check()  # from here on files are deleted that a successor may have written
    storage.with_retries(output, _delete_others, output, found)
    storage.with_retries(output, _unstage, output, lease)
    lease.check()
    small = {
        "vocabulary/characters.txt": characters.to_bytes(),
        "vocabulary/persona_words.txt": persona_words.to_bytes(),
        card.JSON: facts.to_json(),
        card.PAGE: facts.to_html(),
    }
    for path, data in small.items():
        write(storage.join(output, path), data)
    lease.check()
    storage.with_retries(output, found.write, output)
