"""Flat arrays to the tensors of all micro-batches of a window at once.

What :class:`arplus.model.batch.Sequences` says of a micro-batch takes a dozen small operations to find out. Here it is
found for all of them together, and each micro-batch is a view of that: no Python loop does more than cut.
Dimensions are those of :mod:`arplus.model.batch`; M micro-batches have L sequences in K blocks and N tokens in all.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, repeat
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from arplus.data.collate import Int, Lists, MicroBatches
from arplus.model.batch import Batch, Block, Packed, Sequences

BLOCK_SHARES = (0.55, 0.3, 0.15)
"""How a micro-batch, in order of context length, is cut into blocks that attention pads: few, since each costs launches
in every call, and the fewer sequences in one the longer they are. Of 64 examples the padded S, S² and T · S are 1.50,
1.78 and 2.16 times the real ones; in a single block 2.93, 5.42 and 4.23. A fourth one saves the real model nothing, and
costs the tiny one 8 % of a step."""
ONE_BLOCK = (1.0,)


def unpack(flat: MicroBatches, shares: Iterable[float] = BLOCK_SHARES, *, pin: bool = False) -> Iterator[Batch]:
    """The micro-batches as tensors, in pinned memory if wanted. They share one tensor for each field.

    That is filled at once; each batch is cut from it when it is asked for. Thousands of tensor objects that live for
    some time made Python's garbage collector run as long as all the rest took.
    """

    def tensor(array: NDArray[Any]) -> Tensor:
        found = torch.from_numpy(array)
        return found.pin_memory() if pin else found

    def packed(lists: Lists, examples_M: Int, shares: Iterable[float]) -> tuple[Iterator[Packed], list[int]]:
        found, tokens_M = sequences(lists.lengths.astype(np.int64), examples_M.astype(np.int64), shares, tensor)
        ids = cut(tensor(lists.values.astype(np.int32)), tokens_M)
        return map(Packed, ids, found), tokens_M

    context, context_tokens = packed(flat.context, flat.examples, shares)
    profiles, _ = packed(flat.profiles, flat.profile_counts, ONE_BLOCK)
    persona, _ = packed(flat.persona, flat.examples, shares)
    response, response_tokens = packed(flat.response, flat.examples, shares)
    infilled = packed(flat.infilled, flat.examples, shares)[0] if flat.infilled else repeat(None)
    related, examples = flat.persona_related, flat.examples.tolist()
    labels = repeat(None) if related is None else cut(tensor(related.astype(np.int32)), examples)
    fields = {
        "example_id_B": cut(tensor(flat.example_id.astype(np.int64)), examples),
        "context": context,
        "speaker_N": cut(tensor(flat.speaker.astype(np.int32)), context_tokens),
        "profiles": profiles,
        "persona": persona,
        "response": response,
        "target_N": cut(tensor(flat.target.astype(np.int32)), response_tokens),
        "infilled": infilled,
        "persona_related_B": labels,
    }
    return (Batch(**dict(zip(fields, values, strict=True))) for values in zip(*fields.values(), strict=False))


def cut(tensor: Tensor, sizes: list[int]) -> Iterator[Tensor]:
    """Consecutive parts of a tensor; a few at a time, which takes a third of the time of one by one."""
    end = 0
    for first in range(0, len(sizes), 16):
        few = sizes[first : first + 16]
        yield from tensor.narrow(0, end, sum(few)).split(few)
        end += sum(few)


def sequences(
    lengths_L: NDArray[np.int64],
    examples_M: NDArray[np.int64],
    shares: Iterable[float],
    tensor: Callable[[NDArray[Any]], Tensor] = torch.from_numpy,
) -> tuple[Iterator[Sequences], list[int]]:
    """What :meth:`arplus.model.batch.Sequences.of` gives for each micro-batch, its blocks by ``shares``.

    And the number of tokens in each.
    """
    M, L = len(examples_M), len(lengths_L)
    blocks_MK = block_sizes(examples_M, shares)
    full_MK = blocks_MK > 0
    block_K = blocks_MK[full_MK]
    first_K = np.cumsum(block_K) - block_K
    width_K = np.maximum(np.maximum.reduceat(lengths_L, first_K), 1) if L else block_K
    # Of sequences, tokens and slots: how many come before each one, and at last all of them.
    token_L = np.append(0, np.cumsum(lengths_L))
    slot_K = np.append(0, np.cumsum(block_K * width_K))
    end_M = np.append(0, np.cumsum(examples_M))
    end_K = np.append(first_K, L)

    offset = np.arange(L + M) - np.repeat(np.arange(M), examples_M + 1)
    offsets = token_L[offset] - np.repeat(token_L[end_M[:-1]], examples_M + 1)
    row_L = np.arange(L) - np.repeat(end_M[:-1], examples_M)
    slot_L = (np.arange(L) - np.repeat(first_K, block_K)) * np.repeat(width_K, block_K)
    place_N = np.arange(token_L[-1])
    position_N = place_N - np.repeat(token_L[:-1], lengths_L)
    slot_N = position_N + np.repeat(slot_L, lengths_L)
    tokens_K = np.diff(token_L[end_K])
    token = np.repeat(tokens_K, np.diff(slot_K))
    token[slot_N + np.repeat(slot_K[:-1], tokens_K)] = place_N - np.repeat(token_L[first_K], tokens_K)

    tokens_M = np.diff(token_L[end_M]).tolist()
    end_blocks = np.append(0, np.cumsum(full_MK.sum(1)))
    blocks = list(zip(block_K.tolist(), tokens_K.tolist(), width_K.tolist(), strict=True))
    found = map(
        Sequences,
        cut(tensor(offsets), (examples_M + 1).tolist()),
        cut(tensor(np.repeat(row_L, lengths_L)), tokens_M),
        cut(tensor(position_N), tokens_M),
        cut(tensor(slot_N), tokens_M),
        cut(tensor(token), np.diff(slot_K[end_blocks]).tolist()),
        (tuple(map(Block._make, blocks[a:b] or [(0, 0, 1)])) for a, b in pairwise(end_blocks.tolist())),
    )
    return found, tokens_M


def block_sizes(examples_M: NDArray[np.int64], shares: Iterable[float]) -> NDArray[np.int64]:
    """Sequences in each block of each micro-batch, (M, K); 0 where it is too small for so many."""
    ends_MK = np.round(np.outer(examples_M, np.cumsum(list(shares)))).astype(np.int64)
    return np.diff(ends_MK, prepend=0)
