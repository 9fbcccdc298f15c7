"""Replies by nucleus sampling or greedily: a whole batch in one tensor program, with cached keys and values.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import numpy as np
import torch
from torch import Tensor

from arplus.config import Sampling, special_ids
from arplus.model.arplus import ARPlus
from arplus.model.batch import Batch

GREEDY = Sampling(temperature=0)
"""The likeliest character each time."""


def top_filtering(logits_BV: Tensor, *, top_k: int = 0, top_p: float = 0.9) -> Tensor:
    """Logits with -inf for all ids but the top k and, of these, the nucleus (Holtzman et al. 2019).

    The nucleus is the smallest set of likeliest ids whose probability exceeds ``top_p``; an id as likely as its last
    one belongs to it. Zero switches either off.
    """
    if top_k > 0:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    if top_p > 0:
        sorted_BV = _descending(logits_BV)
        # An id goes when the ids before it have passed top_p by themselves; so the first one past it stays.
        passed_BV = sorted_BV.softmax(-1).cumsum(-1) > top_p
        last_B1 = (~passed_BV).sum(-1, keepdim=True).clamp(max=logits_BV.shape[-1] - 1)
        logits_BV = logits_BV.masked_fill(logits_BV < sorted_BV.gather(-1, last_B1), -torch.inf)
    return logits_BV


def _descending(values_BV: Tensor) -> Tensor:
    if values_BV.device.type == "cpu":
        # torch's sort, which also makes the order, takes 39 ms for 64 × 9,498 values, a third of generation; this 9 ms.
        return torch.from_numpy(np.sort(values_BV.numpy(), axis=-1)).flip(-1)
    return values_BV.sort(descending=True).values


def draw(logits_BV: Tensor, uniform_B: Tensor, settings: Sampling) -> Tensor:
    """One id a row (B,): the inverse of its distribution function at ``uniform_B`` in [0, 1), or greedily the best."""
    if settings.temperature == 0:
        return logits_BV.argmax(-1)
    kept_BV = top_filtering(logits_BV / settings.temperature, top_k=settings.top_k, top_p=settings.top_p)
    # In double precision u · total stays below total, and an id of probability zero is never drawn.
    cumulative_BV = kept_BV.double().softmax(-1).cumsum(-1)
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
        return _generate(model, batch, settings, generator)
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
    memories, cache = model.encode(batch), model.new_cache()
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
