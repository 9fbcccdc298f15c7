"""Hashes as 64-bit words in arrays: what sessions are told apart by, and what the ids of their examples come from."""

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

HASH_BYTES = 16
"""Bytes of every hash that duplicates are found by."""

_EXAMPLE_SALT = 0x6172706C75730002


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64-bit words that looks random (the finalizer of SplitMix64, Steele et al. 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def example_ids(keys: NDArray[np.uint64], response_index: NDArray[np.int64]) -> NDArray[np.int64]:
    """Stable ids in 0 … 2^63 - 1 from sessions' keys [n, 2] and the position of the response in the session."""
    mixed = mix(keys[:, 0] ^ mix(response_index.astype(np.uint64) + np.uint64(_EXAMPLE_SALT)))
    return (mixed >> np.uint64(1)).astype(np.int64)


def hash_column(hashes: bytes) -> pa.Array:
    """Hashes that lie end to end as an Arrow column."""
    return pa.Array.from_buffers(pa.binary(HASH_BYTES), len(hashes) // HASH_BYTES, [None, pa.py_buffer(hashes)])


def hash_words(hashes: bytes | pa.ChunkedArray) -> NDArray[np.uint64]:
    """Hashes as pairs of 64-bit words, shape [rows, 2]."""
    data = hashes if isinstance(hashes, bytes) else b"".join(hashes.to_pylist())
    return np.frombuffer(data, dtype="<u8").reshape(-1, 2)
