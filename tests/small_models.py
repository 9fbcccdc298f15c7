"""Small models and batches for the model's tests."""

import dataclasses

import torch

from arplus.config import PRESETS, ModelConfig, VocabularySizes, special_ids
from arplus.model.arplus import ARPlus
from arplus.model.batch import Batch

SIZES = VocabularySizes(characters=60, persona_words=50)


def small(preset: str) -> ModelConfig:
    """One of the paper's rows, small and without dropout: four layers, two of them unique where they are shared."""
    row = PRESETS[preset].model
    return dataclasses.replace(
        row,
        layers=4,
        groups=1 if row.groups == 1 else 2,
        d_model=32,
        embedding_size=32 if row.embedding_size == row.d_model else 24,
        heads=4,
        ff_size=48,
        ff_bottleneck=None if row.ff_bottleneck is None else 10,
        dropout=0.0,
    )


def make_model(config: ModelConfig, seed: int = 0) -> ARPlus:
    """A model with every weight at random, ReZero gates and biases too, so that no path is dead."""
    torch.manual_seed(seed)
    model = ARPlus(config, SIZES).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
            if name.endswith("gate.r"):
                parameter.fill_(0.4)
    return model


def make_batch(config: ModelConfig, rows: int = 5, seed: int = 1, dtype: torch.dtype = torch.int32) -> Batch:
    """Random examples of varied lengths, three profiles each."""
    g = torch.Generator().manual_seed(seed)
    ids = special_ids(SIZES.characters)
    personas = special_ids(SIZES.persona_words) if config.memory_hops else ids

    def ragged(lengths, high, pad, width):
        values = torch.randint(0, high, (*lengths.shape, width), generator=g)
        return values.masked_fill(torch.arange(width) >= lengths[..., None], pad)

    def lengths(low, high, *shape):
        return torch.randint(low, high + 1, shape, generator=g)

    context_length = lengths(3, 20, rows)
    context = ragged(context_length, ids.pad, ids.pad, 20)
    context[torch.arange(rows), context_length - 1] = ids.sep
    reply_length = lengths(1, 9, rows)
    response = torch.full((rows, 11), ids.pad)
    infilled = torch.full((rows, 11), ids.pad)
    for row, n in enumerate(reply_length.tolist()):
        reply = torch.randint(0, ids.pad, (n,), generator=g)
        response[row, : n + 2] = torch.cat([torch.tensor([ids.bos]), reply, torch.tensor([ids.eos])])
        kept = torch.cat([torch.tensor([ids.bos]), reply[: n // 2], torch.tensor([ids.mask, ids.eos])])
        infilled[row, : len(kept)] = kept
    profile = torch.randint(0, 3, (rows, 20), generator=g)
    return Batch(
        example_id_B=torch.arange(rows),
        counted_B=torch.ones(rows, dtype=torch.bool),
        context_BS=context.to(dtype),
        context_profile_BS=profile.masked_fill(context == ids.pad, 0).to(dtype),
        profiles_BPW=ragged(lengths(3, 6, rows, 3), personas.pad, personas.pad, 6).to(dtype),
        target_persona_BK=ragged(lengths(1, 8, rows), personas.pad, personas.pad, 8).to(dtype),
        response_BT=response.to(dtype),
        infilled_BU=infilled.to(dtype) if config.auxiliary == "infilling" else None,
    )
