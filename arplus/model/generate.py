"""Replies by nucleus sampling or greedily: a whole batch in one tensor program, with cached keys and values.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import torch
from torch import Tensor
from torch.nn import functional

from arplus.config import Sampling, special_ids
from arplus.model.arplus import ARPlus
from arplus.model.batch import Batch

GREEDY = Sampling(temperature=0)
"""The likeliest character each time."""


def top_probabilities(logits_BV: Tensor, *, top_k: int = 0, top_p: float = 0.9) -> Tensor:
    """Probabilities of all ids, zero but for the top k and, of these, the nucleus (Holtzman et al. 2019).

    The nucleus is the smallest set of likeliest ids whose probability exceeds ``top_p``; an id as likely as its last
    one belongs to it. Zero switches either off. What is left is not scaled up to a sum of one.
    """
    if top_k > 0:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    p_BV = logits_BV.softmax(-1)
    return p_BV.mul_(p_BV >= _least_in_nucleus(p_BV, top_p)) if top_p > 0 else p_BV


def _least_in_nucleus(p_BV: Tensor, top_p: float) -> Tensor:
    """The probability (B, 1) of the nucleus's last id: one goes when those above it exceed ``top_p`` by themselves."""
    if p_BV.device.type == "cpu" and p_BV.shape[-1] > 2048:
        # 3 ms for 64 × 9,498 values in one thread; numpy's sort of them all takes 9, torch's 39.
        p_BV, outside_B1 = _near_last(p_BV, top_p)
    else:
        outside_B1 = p_BV.sum(-1, keepdim=True) - top_p
    ascending_BV = p_BV.sort().values
    last_B1 = (ascending_BV.cumsum(-1) < outside_B1).sum(-1, keepdim=True)
    return ascending_BV.gather(-1, last_B1.clamp(max=ascending_BV.shape[-1] - 1))


def _near_last(p_BV: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The few probabilities (B, N) near the nucleus's last, and the mass (B, 1) of those of them that are outside.

    Rows that have fewer are filled up with zeros. Floats that are not negative are ordered as their bits are, so they
    fall into buckets in order, 32 an octave; wanted is the one in which the mass from below reaches 1 - ``top_p``.
    """
    B = len(p_BV)
    bucket_BV = (p_BV.view(torch.int32) >> 18).bitwise_and_(4095)
    below_BK = p_BV.new_zeros(B, 4096).scatter_add_(1, bucket_BV.long(), p_BV).cumsum(-1)
    outside_B1 = below_BK[:, -1:] - top_p
    at_B1 = (below_BK < outside_B1).sum(-1, keepdim=True)
    row_N, column_N = (bucket_BV == at_B1).nonzero(as_tuple=True)
    count_B = row_N.bincount(minlength=B)
    place_N = torch.arange(len(row_N)) - (count_B.cumsum(0) - count_B)[row_N]
    near_BN = p_BV.new_zeros(B, max(1, int(count_B.max())))
    near_BN[row_N, place_N] = p_BV[row_N, column_N]
    return near_BN, outside_B1 - functional.pad(below_BK, (1, 0)).gather(1, at_B1)


def draw(logits_BV: Tensor, uniform_B: Tensor, settings: Sampling) -> Tensor:
    """One id a row (B,): the inverse of its distribution function at ``uniform_B`` in [0, 1), or greedily the best."""
    if settings.temperature == 0:
        return logits_BV.argmax(-1)
    p_BV = top_probabilities(logits_BV / settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    # In double precision u · total stays below total, and an id of probability zero is never drawn.
    cumulative_BV = p_BV.cumsum(-1, dtype=torch.float64)
    at_B1 = uniform_B.double()[:, None] * cumulative_BV[:, -1:]
    return torch.searchsorted(cumulative_BV, at_B1, right=True).squeeze(1)


@torch.no_grad()
def generate(
    model: ARPlus, batch: Batch, settings: Sampling | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Replies as character ids (B, L) int64, padded with [PAD]; L is the longest reply's length.

    Any special token ends a reply and is not part of it. ``generator`` (on the CPU) makes the draw reproducible: it is
    read once, row by row, so neither the device nor how long other replies are changes a row's random numbers. The
    batch's response is not read. Dropout is off meanwhile.
    """
    settings = settings or Sampling()
    training = model.training
    model.eval()
    try:
        return _generate(model.folded(), batch, settings, generator)
    finally:
        model.train(training)


def _generate(model: ARPlus, batch: Batch, settings: Sampling, generator: torch.Generator | None) -> Tensor:
    ids = special_ids(model.sizes.characters)
    first_special = min(ids)  # the special tokens are the last ids of the vocabulary
    B, device = len(batch.context_BS), batch.context_BS.device
    uniform_BL = torch.rand(B, settings.max_characters, generator=generator).to(device)
    replies_BL = torch.full((B, settings.max_characters), ids.pad, device=device)
    last_B = torch.full((B,), ids.bos, device=device)
    going_B = torch.ones(B, dtype=torch.bool, device=device)
    memories = [[to.for_steps() for to in memory] for memory in model.encode(batch)]
    cache = model.new_cache()
    for step in range(settings.max_characters):
        logits_BV = model.generator(model.decode(last_B[:, None], memories, cache)[:, 0]).float()
        if step < settings.min_characters:
            logits_BV[:, first_special:] = -torch.inf
        last_B = draw(logits_BV, uniform_BL[:, step], settings)
        going_B = going_B & (last_B < first_special)
        if not going_B.any():
            return replies_BL[:, :step]
        replies_BL[:, step] = torch.where(going_B, last_B, ids.pad)
    return replies_BL
