"""What an audit says: every example of every epoch once, or what is wrong."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from arplus import storage
from arplus.runs.audit import SCHEMA


def read(run_uri: str) -> pa.Table:
    """The rows that count: those of the last attempt of each (epoch, step). Empty where there is no audit."""
    folder = storage.join(run_uri, "audit")
    # A writer that is killed with -9 leaves a file of another name, .….parquet.….tmp, which is no audit.
    files = [uri for uri in storage.list_files(folder, missing_ok=True) if uri.endswith(".parquet")]
    tables = [pq.read_table(pa.BufferReader(storage.read_bytes(uri))) for uri in files]
    rows = pa.concat_tables([SCHEMA.empty_table(), *tables])
    last = rows.group_by(["epoch", "step"]).aggregate([("attempt", "max")]).rename_columns(["epoch", "step", "attempt"])
    return rows.join(last, ["epoch", "step", "attempt"], join_type="inner")


def find_problems(run_uri: str, example_ids: NDArray[np.int64], epochs: int) -> list[str]:
    """What is wrong with the first ``epochs`` epochs; nothing where each has each of ``example_ids`` exactly once."""
    rows = read(run_uri)
    found = []
    for epoch in range(epochs):
        ids = rows["example_id"].to_numpy()[rows["epoch"].to_numpy() == epoch]
        trained, times = np.unique(ids, return_counts=True)
        for what, wrong in (
            ("missing", np.setdiff1d(example_ids, trained)),
            ("unknown", np.setdiff1d(trained, example_ids)),
            ("more than once", trained[times > 1]),
        ):
            if len(wrong):
                found.append(f"epoch {epoch}: {len(wrong)} examples {what}, such as {wrong[:5].tolist()}")
    return found
