"""Replies by nucleus sampling or greedily: a whole batch in one tensor program, with cached keys and values.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import torch
from torch import Tensor

from arplus.config import Sampling, special_ids
from arplus.model.batch import Batch, Packed, Sequences
from arplus.model.network import PersonaTransformer

_DRAWS = 4
"""Random numbers per character: for top_p = 0.9 three leave one row in a thousand to the fourth, which takes a sort."""


def top_probabilities(logits_BV: Tensor, *, top_k: int = 0, top_p: float = 0.9) -> Tensor:
    """Probabilities of all ids, zero but for the top k and, of these, the nucleus (Holtzman et al. 2019).

    The nucleus is the smallest set of likeliest ids whose probability exceeds ``top_p``; an id as likely as its last
    one belongs to it. Zero switches either off. What is left is not scaled up to a sum of one.
    """
    if top_k > 0:
        kth_B1 = logits_BV.topk(min(top_k, logits_BV.shape[-1])).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)
    p_BV = logits_BV.softmax(-1)
    if top_p == 0:
        return p_BV
    ascending_BV = p_BV.sort().values
    # Up to the last id of the nucleus, from below: an id goes when those above it exceed top_p by themselves.
    outside_BV = ascending_BV.cumsum(-1) < p_BV.sum(-1, keepdim=True) - top_p
    last_B1 = outside_BV.sum(-1, keepdim=True).clamp(max=p_BV.shape[-1] - 1)
    return p_BV * (p_BV >= ascending_BV.gather(-1, last_B1))


def draw(logits_BV: Tensor, uniform_BR: Tensor, settings: Sampling) -> Tensor:
    """One id per row (B,), by the random numbers ``uniform_BR`` in [0, 1), R ≥ 2 per row, or greedily the best.

    Only a sort tells what is in the nucleus, 0.6 ms per row, but one sum tells whether an id is. So ids of the whole
    distribution are drawn until one is, which ``top_p`` of them are: exactly draws from the nucleus. The last random
    number draws from the nucleus itself what the others did not.
    """
    if settings.temperature == 0:
        return logits_BV.argmax(-1)
    # From the highest, so that no temperature makes them infinite.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / settings.temperature
    p_BV = top_probabilities(logits_BV, top_k=settings.top_k, top_p=0)
    tried_BR = _inverse(p_BV, uniform_BR[:, :-1])
    id_B = tried_BR[:, 0].clone()
    if settings.top_p == 0:
        return id_B
    left_N = (~_in_nucleus(p_BV, id_B, settings.top_p)).nonzero()[:, 0]
    for tried_B in tried_BR.unbind(1)[1:]:
        id_B[left_N] = tried_B[left_N]
        left_N = left_N[~_in_nucleus(p_BV[left_N], id_B[left_N], settings.top_p)]
    nucleus_NV = top_probabilities(logits_BV[left_N], top_k=settings.top_k, top_p=settings.top_p)
    id_B[left_N] = _inverse(nucleus_NV, uniform_BR[left_N, -1:])[:, 0]
    return id_B


def _in_nucleus(p_BV: Tensor, id_B: Tensor, top_p: float) -> Tensor:
    """Whether those above each id have at most ``top_p`` by themselves."""
    return (p_BV * (p_BV > p_BV.gather(1, id_B[:, None]))).sum(1) <= top_p


def _inverse(p_BV: Tensor, uniform_BR: Tensor) -> Tensor:
    """The inverse of each row's distribution function."""
    # In double precision u · total stays below total, and an id of probability zero is never drawn.
    cumulative_BV = p_BV.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(cumulative_BV, uniform_BR.double() * cumulative_BV[:, -1:], right=True)


@torch.no_grad()
def generate(model: PersonaTransformer, batch: Batch, settings: Sampling, rng: torch.Generator | None = None) -> Tensor:
    """Replies as character ids (B, L) int64, padded with [PAD]; L is the longest reply's length.

    ``settings`` say how long a reply may be (:meth:`Sampling.of`). Any special token ends a reply and is not part of
    it. ``rng`` (on the CPU) makes the draw reproducible: it is read once, row by row, so neither the device nor how
    long other replies are changes a row's random numbers. The batch's response is not read. Dropout is off meanwhile.
    """
    training = model.training
    model.eval()
    try:
        return _generate(model, batch, settings, rng)
    finally:
        model.train(training)


def _generate(model: PersonaTransformer, batch: Batch, settings: Sampling, rng: torch.Generator | None) -> Tensor:
    ids = special_ids(model.sizes.characters)
    first_special = min(ids)  # the special tokens are the last ids of the vocabulary
    contexts = batch.context.sequences
    B, device = len(contexts), contexts.offsets.device
    longest = settings.max_characters
    assert longest is not None, "Sampling.of fills it in"
    uniform_BLR = torch.rand(B, longest, _DRAWS, generator=rng).to(device)
    replies_BL = torch.full((B, longest), ids.pad, device=device)
    last_B = torch.full((B,), ids.bos, device=device)
    going_B = torch.ones(B, dtype=torch.bool, device=device)
    memories, cache = model.encode(batch), model.new_cache()
    one_each = Sequences.of(torch.ones(B), [block.sequences for block in contexts.blocks]).to(device)
    for step in range(longest):
        hidden_BD = model.decode(Packed(last_B, one_each), memories, cache, start=step)
        logits_BV = model.head(hidden_BD).float()
        if step < settings.min_characters:
            logits_BV[:, first_special:] = -torch.inf
        last_B = draw(logits_BV, uniform_BLR[:, step], settings)
        going_B = going_B & (last_B < first_special)
        if not going_B.any():
            return replies_BL[:, :step]
        replies_BL[:, step] = torch.where(going_B, last_B, ids.pad)
    return replies_BL
