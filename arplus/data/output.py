"""The output of a preparation: whose it is, and how it is committed.

Files of examples have names of their own preparation; the vocabularies and the card follow, then the manifest. So a
folder with a manifest is whole, and one without is no data set, whenever and however the job ends.
"""

import logging
from typing import Any

from arplus import storage
from arplus.data import card, shards
from arplus.data.dataset import MANIFEST
from arplus.data.lease import Lease, is_unfinished
from arplus.errors import UserError
from arplus.text import Vocabulary

STAGING = "_temporary"
"""Folder below the output that holds unfinished work."""

log = logging.getLogger(__name__)


def claim(output: str, splits: list[str]) -> Lease:
    """Makes the output ours and empty: what an unfinished preparation left is removed, anything else is an error."""
    manifest = storage.join(output, MANIFEST)
    taken = UserError(f"{output}: holds a prepared data set; choose another --output or delete it first")
    if storage.exists(manifest):
        raise taken
    unfinished = is_unfinished(output)
    if not unfinished and storage.exists(output) and storage.list_files(output):
        raise UserError(f"{output}: is not empty and no unfinished data set; choose another --output")
    lease = Lease.take(output)
    if storage.exists(manifest):  # since we looked
        lease.release(finished=True)
        raise taken
    if unfinished:
        log.info("removing what an unfinished preparation left in %s", output)
        for folder in {*splits, "vocabulary", "rejects", STAGING, card.JSON, card.PAGE}:
            storage.delete(storage.join(output, folder))
    return lease


def leave(output: str, lease: Lease, finished: bool) -> None:
    """Gives the output back; a failed preparation leaves its rejects, and the mark that it is unfinished."""
    try:
        if not finished:
            storage.delete(storage.join(output, STAGING))
        lease.release(finished=finished)
    except UserError as error:  # what made the preparation fail is the better message; a finished one is whole
        log.warning("%s: could not be tidied up (%s)", output, error)


def commit(
    output: str,
    lease: Lease,
    manifest: dict[str, Any],
    facts: dict[str, Any],
    characters: Vocabulary,
    persona_words: Vocabulary,
) -> None:
    """Writes all that is not examples, the manifest last; and removes what others left while we worked."""
    ours = {file["path"] for split in manifest["splits"].values() for file in split["files"]}
    for folder in manifest["splits"]:
        uri = storage.join(output, folder)
        for file in storage.list_files(uri) if storage.exists(uri) else []:
            if storage.join(folder, file.rsplit("/", 1)[-1]) not in ours:
                storage.delete(file)
    storage.patiently(output, lambda: storage.delete(storage.join(output, STAGING)))
    lease.check()
    small = {
        "vocabulary/characters.txt": characters.to_bytes(),
        "vocabulary/persona_words.txt": persona_words.to_bytes(),
        card.JSON: card.to_json(facts),
        card.PAGE: card.to_html(facts),
    }
    for path, data in small.items():
        shards.write(storage.join(output, path), data)
    lease.check()
    storage.patiently(output, lambda: storage.write_json(storage.join(output, MANIFEST), manifest))
