"""The last stages of the preparation: sessions are encoded, and examples sorted and written as the parts of a split."""

from collections import Counter
from hashlib import blake2b
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray

from arplus import storage
from arplus.config import PrepareConfig
from arplus.data import examples
from arplus.data.manifest import DataFile
from arplus.prepare.tasks import Staged, Survivors, pack, unpack, write
from arplus.text import Vocabulary

ROW_GROUP_ROWS = 8192
"""Examples per row group: what the feed reads at once."""
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": False,
    # Small ids: the upper bytes are runs of zeros. Smaller and faster than the rest; but not for booleans.
    "use_byte_stream_split": ["example_id", *(f"{name}.list.element" for name in examples.LIST_COLUMNS)],
    "write_statistics": False,
}
"""How examples are written: 105 bytes each; a dictionary took 119 and a third more time."""


@ray.remote
def encode(
    config: PrepareConfig,
    shards: list[Staged],
    survivors: Survivors,
    characters: Vocabulary,
    persona_words: Vocabulary,
    parts: dict[str, int],
) -> Any:
    """Encodes shards: by split the pairs left out by reason, and the examples about the persona by rule.

    And then the examples of every part of every split, packed. ``parts`` are how many parts each split has, in the
    order of the splits.
    """
    left_out, related = ({split: Counter[str]() for split in parts} for _ in range(2))
    names = list(parts)
    pieces: list[list[pa.Table]] = [[] for _ in range(sum(parts.values()))]
    first_part = np.cumsum([0, *parts.values()])
    parts_of = np.array(list(parts.values()), np.uint64)
    for shard in shards:
        sessions, session_split = survivors.read(shard)
        encoded = examples.encode_sessions(sessions, characters, persona_words, config.rules)
        for i, reasons in encoded.left_out_of(session_split).items():
            left_out[names[i]].update(reasons)
        for i, rules in encoded.persona_related_of(session_split).items():
            related[names[i]].update(rules)
        split = session_split[encoded.session]
        ids = encoded.table["example_id"].to_numpy().astype(np.uint64)
        # Equal ranges of the 63-bit ids: which part an example is in depends on nothing but its id.
        place = first_part[split] + (((ids >> np.uint64(31)) * parts_of[split]) >> np.uint64(32)).astype(np.int64)
        order = np.argsort(place, kind="stable")
        ends = np.cumsum(np.bincount(place, minlength=len(pieces)))
        table = encoded.table.take(pa.array(order))
        for i, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            pieces[i].append(table.slice(start, end - start))
    return (left_out, related), *(pack(pa.concat_tables(piece)) for piece in pieces)


@ray.remote
def write_part(output: str, token: str, split: str, part: int, *pieces: bytes) -> DataFile | None:
    """Sorts the examples of a part by id and writes them as one Parquet file; None where there are none.

    The file's name has the preparation's token in it, so whatever another preparation of the same output still
    writes, it is not this file.
    """
    table = pa.concat_tables([unpack(piece) for piece in pieces])
    if not len(table):
        return None
    order = np.argsort(table["example_id"].to_numpy(), kind="stable")
    table = table.combine_chunks().take(pa.array(order)).combine_chunks()
    path = f"{split}/part-{part:05d}-{token}.parquet"
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=ROW_GROUP_ROWS, **PARQUET_OPTIONS)
    write(storage.join(output, path), sink.getvalue())
    starts = range(0, len(table), ROW_GROUP_ROWS)
    groups = [min(ROW_GROUP_ROWS, len(table) - start) for start in starts]
    return DataFile(path=path, rows=len(table), row_groups=groups, digest=digest(table))


def digest(table: pa.Table) -> str:
    """Digest of a table's rows (:data:`arplus.data.examples.SCHEMA`), the same however they lie in memory."""
    total = blake2b(digest_size=16)
    total.update(table["example_id"].to_numpy().astype("<i8").tobytes())
    for name in examples.LIST_COLUMNS:
        column = table[name].combine_chunks()
        total.update(pc.list_value_length(column).to_numpy(zero_copy_only=False).astype("<i4").tobytes())
        total.update(column.flatten().to_numpy().astype("<i4", copy=False).data)
    total.update(table["persona_related"].to_numpy().tobytes())
    return total.hexdigest()
