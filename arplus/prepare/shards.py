"""Staged shards: the sessions of one block of input, in a file of their own between the stages."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
from numpy.typing import NDArray

from arplus import storage
from arplus.data.sessions import hash_words
from arplus.prepare.duplicates import Boundaries, split_hash


@dataclass(frozen=True)
class Shard:
    """A block of input after parsing."""

    file: int
    first_line: int
    read: int
    """Bytes of the file that were read so far."""
    uri: str
    """Where its sessions are staged; empty without sessions."""
    problem: str | None
    """Why the job cannot go on, for the user."""
    resources: bool
    """Whether that is a lack of resources."""
    counts: dict[str, int]
    """As in :class:`arplus.data.sessions.ParsedBlock`."""
    rejected: dict[str, int]
    """Rejected lines by reason."""


class Staged(NamedTuple):
    """Where a shard's sessions are, and what they are for."""

    uri: str
    split: int | None
    """The evaluation set's index among all splits; ``None`` where each session's dialogue decides."""


def write_shard(uri: str, sessions: pa.Table) -> None:
    """Stages a shard's sessions."""
    sink = pa.BufferOutputStream()
    feather.write_feather(sessions, sink, compression="lz4")
    write(uri, sink.getvalue())


def write(uri: str, data: pa.Buffer | bytes) -> None:
    """Writes a file of ours, patiently."""
    storage.with_retries(uri, lambda: storage.write_bytes(uri, data))


def read_survivors(
    shard: Staged, removed: NDArray[np.int64], boundaries: Boundaries
) -> tuple[pa.Table, NDArray[np.int8]]:
    """The staged sessions of a shard that stay, and the split of each; ``removed`` are the others' ids in order."""
    data = storage.with_retries(shard.uri, lambda: storage.read_bytes(shard.uri))
    sessions = feather.read_table(pa.BufferReader(data))
    if shard.split is not None:
        return sessions, np.full(len(sessions), shard.split, np.int8)
    ids = sessions["id"].to_numpy()
    first, last = np.searchsorted(removed, [ids[0], ids[-1] + 1])
    if first < last:
        sessions = sessions.filter(pa.array(~np.isin(ids, removed[first:last])))
    return sessions, boundaries.assign(split_hash(hash_words(sessions["dialogue_hash"])))
