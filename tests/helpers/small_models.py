"""Small models and batches for the model's tests."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from arplus.config import PRESETS, ModelConfig, SpecialIds, TrainConfig, VocabularySizes, preset, special_ids, tiny
from arplus.model.batch import Batch, Packed, Sequences
from arplus.model.network import PersonaTransformer
from arplus.model.objective import Losses

SIZES = VocabularySizes(characters=60, persona_words=50)
WEIGHTED = ("ar-weighted", "arplus-weighted")
"""The presets that predict a persona weight."""

FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "unshared": ("arplus", {"shared_stacks": False, "memory_tying": "layer-wise", "memory_hops": 3}),
    "unshared-gelu": ("no-rezero", {"shared_stacks": False, "ff_bottleneck": None, "activation": "gelu"}),
    "unshared-ar": ("ar", {"shared_stacks": False, "activation": "gelu-tanh"}),
    "adapters": ("arplus", {"adapter": 6}),
    "adapters-no-rezero": ("no-rezero", {"adapter": 6}),
}
"""Members of the family without a name of their own: a preset, and what differs."""
MEMBERS = ("ar", "arplus", "no-bart-mlm", "no-memn2n", *WEIGHTED, *FORMS)
"""As few as have every part of the family between them; the golden files hold all rows."""


def smallest_run(preset_name: str = "arplus") -> TrainConfig:
    """A preset's run with a network as small as tests can have it that still has all of the preset's parts."""
    base, changes = FORMS.get(preset_name, (preset_name, {}))
    run = tiny(preset(base))
    return dataclasses.replace(
        run,
        model=dataclasses.replace(
            run.model,
            d_model=32,
            embedding_size=32 if run.model.embedding_size == run.model.d_model else 16,
            heads=2,
            ff_size=48,
            **{"ff_bottleneck": None if run.model.ff_bottleneck is None else 16} | changes,
        ),
    )


def small(preset: str) -> ModelConfig:
    """A preset or a form, small and without dropout: four layers, two of them unique where they are shared."""
    base, changes = FORMS.get(preset, (preset, {}))
    row = PRESETS[base].model
    return dataclasses.replace(
        row,
        layers=4,
        repeats=1 if row.repeats == 1 else 2,
        d_model=32,
        embedding_size=32 if row.embedding_size == row.d_model else 24,
        heads=4,
        ff_size=48,
        dropout=0.0,
        **{"ff_bottleneck": None if row.ff_bottleneck is None else 10} | changes,
    )


def make_model(config: ModelConfig, seed: int = 0) -> PersonaTransformer:
    """A model with every weight at random, ReZero gates and biases too, so that no path is dead."""
    torch.manual_seed(seed)
    model = PersonaTransformer(config, SIZES).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
            else:
                parameter.mul_(2)
            if name.endswith(".r"):
                parameter.fill_(0.4)
            if name.endswith("adapter.up.weight"):
                parameter.normal_(std=0.5)
    return model


def persona_ids(config: ModelConfig) -> SpecialIds:
    """Special ids of the vocabulary that personas are made of."""
    return special_ids(SIZES.persona_words if config.memory_hops else SIZES.characters)


def make_batch(config: ModelConfig, examples: int = 5, seed: int = 1, dtype: torch.dtype = torch.int32) -> Batch:
    """Random examples of varied lengths in one block, three profiles each."""
    g = torch.Generator().manual_seed(seed)
    ids, persona = special_ids(SIZES.characters), persona_ids(config)

    def drawn(shortest: int, longest: int, below: int) -> list[int]:
        length = int(torch.randint(shortest, longest + 1, (), generator=g))
        return torch.randint(0, below, (length,), generator=g).tolist()

    contexts = [[*drawn(2, 19, ids.pad), ids.sep] for _ in range(examples)]
    speakers = [3 * i + k for i, row in enumerate(contexts) for k in drawn(len(row), len(row), 3)]
    replies = [drawn(1, 9, ids.pad) for _ in range(examples)]
    infilled = [[ids.bos, *reply[: len(reply) // 2], ids.mask, ids.eos] for reply in replies]
    batch = Batch(
        example_id_B=torch.arange(examples),
        context=Packed.of(contexts),
        speaker_N=torch.tensor(speakers, dtype=torch.int64),
        profiles=Packed.of([drawn(3, 6, persona.pad) for _ in range(3 * examples)]),
        persona=Packed.of([drawn(1, 8, persona.pad) for _ in range(examples)]),
        response=Packed.of([[ids.bos, *reply] for reply in replies]),
        target_N=torch.tensor([i for reply in replies for i in (*reply, ids.eos)], dtype=torch.int64),
        infilled=Packed.of(infilled) if config.auxiliary == "infilling" else None,
        persona_related_B=torch.arange(examples) % 2 if config.persona_weight == "predicted" else None,
    )
    return cast(batch, dtype)


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The batch with ids of this type; where sequences lie stays int64."""
    changed = {}
    for f in dataclasses.fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Packed):
            changed[f.name] = value._replace(ids=value.ids.to(dtype))
        elif f.name in ("speaker_N", "target_N", "persona_related_B") and value is not None:
            changed[f.name] = value.to(dtype)
    return dataclasses.replace(batch, **changed)


def gradients(model: PersonaTransformer, losses: Losses) -> dict[str, torch.Tensor]:
    """The gradient of L_D + L_LM (+ L_W) for every parameter."""
    model.zero_grad()
    (losses.sum_dialogue + losses.sum_auxiliary + (0 if losses.sum_weight is None else losses.sum_weight)).backward()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    missing = [name for name, gradient in found.items() if gradient is None]
    assert not missing
    return found


def parts(values_N: torch.Tensor, of: Sequences) -> list[torch.Tensor]:
    """What belongs to each of the sequences."""
    return list(values_N.split(of.lengths.tolist()))


def take(batch: Batch, index: Iterable[int], blocks: list[int] | None = None) -> Batch:
    """These examples of a batch in this order, in blocks of so many each, with the profiles that speak in them."""
    index = list(index)

    def taken(packed: Packed) -> Packed:
        rows = [parts(*packed)[i] for i in index]
        lengths = torch.tensor([len(row) for row in rows], dtype=torch.int64)
        return Packed(torch.cat([packed.ids[:0], *rows]), Sequences.of(lengths, blocks))

    def joined(values_N: torch.Tensor, of: Sequences) -> torch.Tensor:
        return torch.cat([values_N[:0], *(parts(values_N, of)[i] for i in index)])

    speaker_N = joined(batch.speaker_N, batch.context.sequences)
    speaking, place_N = speaker_N.unique(return_inverse=True)
    profiles = [parts(*batch.profiles)[i] for i in speaking]
    lengths = torch.tensor([len(profile) for profile in profiles], dtype=torch.int64)
    return dataclasses.replace(
        batch,
        example_id_B=batch.example_id_B[index],
        context=taken(batch.context),
        speaker_N=place_N.to(speaker_N.dtype),
        profiles=Packed(torch.cat([batch.profiles.ids[:0], *profiles]), Sequences.of(lengths)),
        persona=taken(batch.persona),
        response=taken(batch.response),
        target_N=joined(batch.target_N, batch.response.sequences),
        infilled=None if batch.infilled is None else taken(batch.infilled),
        persona_related_B=None if batch.persona_related_B is None else batch.persona_related_B[index],
    )
