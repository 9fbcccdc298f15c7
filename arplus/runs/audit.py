"""The audit: which examples every step trained on, as Parquet under ``RUN/audit/``.

Columns: ``attempt``, ``epoch`` and ``step`` (the optimizer step within the epoch), both from 0, and ``example_id``.
Every worker writes its own rows, before the checkpoint that covers them is complete. A step that was trained again
after a restart is there once per attempt: for each (epoch, step) the last attempt counts.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from arplus import storage
from arplus.data.loader import Step

SCHEMA = pa.schema(
    [("attempt", pa.int32()), ("epoch", pa.int32()), ("step", pa.int32()), ("example_id", pa.int64())],
)


class Audit:
    """One worker's rows of one attempt, kept in memory until :meth:`flush`."""

    def __init__(self, run_uri: str, attempt: int, rank: int) -> None:
        self.run_uri = run_uri
        self.attempt = attempt
        self.rank = rank
        self.rows: list[tuple[int, int, NDArray[np.int64]]] = []
        self.files = 0

    def add(self, epoch: int, epoch_step: int, step: Step) -> None:
        """Notes this worker's examples of a step."""
        ids = [batch.example_id_B.numpy() for batch in step.micro_batches]
        self.rows.append((epoch, epoch_step, np.concatenate(ids)))

    def flush(self) -> None:
        """Writes the rows since the last time; they are durable when it returns."""
        if not self.rows:
            return
        counts = [len(ids) for _, _, ids in self.rows]
        table = pa.table(
            [
                np.full(sum(counts), self.attempt),
                np.repeat([epoch for epoch, _, _ in self.rows], counts),
                np.repeat([step for _, step, _ in self.rows], counts),
                np.concatenate([ids for _, _, ids in self.rows]),
            ],
            schema=SCHEMA,
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        name = f"attempt-{self.attempt:04d}-worker-{self.rank:04d}-{self.files:06d}.parquet"
        storage.write_bytes(storage.join(self.run_uri, "audit", name), sink.getvalue().to_pybytes())
        self.files += 1
        self.rows.clear()
