"""What one worker's memory holds at most in a step, for ``--dry-run`` and checks: train state and activations.

The train state follows what DeepSpeed 0.19 was seen to hold; ``tests/training/test_footprint.py`` counts it again.
All of it is fp32: bf16 is autocast's, and its copies of weights are counted with the activations.
"""

from collections.abc import Collection, Sequence

import torch

from arplus.config import ExampleRules, ModelConfig, TrainConfig, VocabularySizes
from arplus.model.batch import Batch, Packed, Sequences
from arplus.model.cost import outline

BYTES = 4
BUCKET = 1 << 24
"""Most elements of a bucket in which ZeRO adds gradients up: 64 MiB, two of them for AR+ and 18 for arplus-large."""
PERSONA_WORDS, PERSONA_CHARACTERS = 16, 40
"""A long persona."""
_PERSISTENT = 100_000
"""DeepSpeed's ``stage3_param_persistence_threshold``: smaller parameters stay whole on every worker."""


def state_bytes(stage: int, workers: int, sizes: list[int], frozen: Sequence[int] = ()) -> int:
    """Bytes of weights, gradients, AdamW's moments and DeepSpeed's buffers on one worker at a step's fullest moment.

    ``sizes`` are the numbers of elements of the trained parameters, a shared one once, and ``frozen`` those of the
    others, which have weights alone. A gradient of a shared layer is complete
    at the end of the backward pass only, so that stage 2 saves next to nothing over stage 1 here. For stage 3 it is
    too low, by up to a third, where a bucket has no room for two of the largest parameters.
    """
    n, weights = sum(sizes), sum(sizes) + sum(frozen)
    part = -(-n // workers)
    bucket = min(BUCKET, n)
    if stage == 0:
        elements = weights + n + 2 * n + n  # gradients, moments; one flat copy of the gradients to add them up
    elif stage < 3:
        elements = weights + 3 * part + max(n + bucket, 2 * part)  # masters and moments in parts; gradients
    else:
        whole = sum(size for size in (*sizes, *frozen) if size < _PERSISTENT)
        # Weights, gradients and moments in parts; gradients not yet added up; what is gathered; a bucket, two copies.
        elements = -(-weights // workers) + 3 * part + n + whole + min(2 * bucket, weights) + 3 * bucket
    return BYTES * elements


def activation_bytes(
    model: ModelConfig, sizes: VocabularySizes, rules: ExampleRules, examples: int, only: Collection[str] = ()
) -> int:
    """Bytes that the forward pass of a micro-batch of the longest examples keeps for its backward pass, in fp32.

    ``only`` as in :func:`outline`: of a frozen matrix the pass keeps no input.

    Counted on a model without memory (torch's "meta" device), so it is the model's own code that is counted, as it runs
    on a GPU: the same functions on a CPU keep less of what they drop.
    """
    network = outline(model, sizes, only)
    network.frozen = _Shapes(model)
    weights = {p.untyped_storage() for p in network.parameters()}
    kept = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        network(_longest(model, rules, examples))
    return sum(storage.nbytes() for storage in kept - weights)


class _Shapes:
    """The pretrained model that features are of, without values: what it computes is kept, its own layers are not."""

    def __init__(self, model: ModelConfig) -> None:
        self.width, self.layers = model.features.width or 0, len(model.features.layer_indices)

    def contextual(self, packed: Packed) -> list[torch.Tensor]:
        """The hidden states of the chosen layers."""
        return [self.pointwise(packed) for _ in range(self.layers)]

    def pointwise(self, packed: Packed, start: int = 0) -> torch.Tensor:
        """The embeddings."""
        return torch.zeros(len(packed.ids), self.width, device="meta")


def checkpoint_bytes(model: ModelConfig, sizes: VocabularySizes, only: Collection[str] = ()) -> int:
    """Bytes of a checkpoint, its few small files left out: weights, and two moments of what is trained."""
    trained, frozen = _elements(model, sizes, only)
    return BYTES * (3 * sum(trained) + sum(frozen))


def run_bytes(config: TrainConfig, sizes: VocabularySizes) -> int:
    """Bytes of a run's checkpoints at one time: those that are kept, the best one and one that is being written.

    At the least where --keep-checkpoints is all, whose number nobody knows.
    """
    kept = 1 if config.keep_checkpoints == "all" else config.keep_checkpoints
    return (kept + 2) * checkpoint_bytes(config.model, sizes, config.optimizer.only)


def weight_bytes(config: TrainConfig, sizes: VocabularySizes) -> int:
    """Bytes of a checkpoint that holds weights alone."""
    return BYTES * sum(map(sum, _elements(config.model, sizes, config.optimizer.only)))


def worker_bytes(config: TrainConfig, sizes: VocabularySizes) -> dict[tuple[int, int], int]:
    """(stage, workers) → bytes of one worker's train state, for every stage and every number of workers of the run."""
    trained, frozen = _elements(config.model, sizes, config.optimizer.only)
    return {(s, w): state_bytes(s, w, trained, frozen) for s in range(4) for w in config.world_sizes}


def _elements(model: ModelConfig, sizes: VocabularySizes, only: Collection[str]) -> tuple[list[int], list[int]]:
    """Elements of each trained and of each frozen parameter."""
    network = outline(model, sizes, only)
    trained, frozen = ([p.numel() for p in network.parameters() if p.requires_grad is kind] for kind in (True, False))
    return trained, frozen


def _longest(model: ModelConfig, rules: ExampleRules, examples: int) -> Batch:
    def packed(length: int, sequences: int = examples) -> Packed:
        found = Sequences.of(torch.full((sequences,), length))
        return Packed(torch.zeros(len(found.sequence_N), dtype=torch.int32), found).to("meta")

    persona = PERSONA_WORDS if model.memory_hops else PERSONA_CHARACTERS
    response = packed(rules.max_response_ids - 1)  # its [EOS] is a target alone
    return Batch(
        example_id_B=torch.zeros(examples, dtype=torch.int64, device="meta"),
        context=packed(rules.max_context_ids),
        speaker_N=torch.zeros(examples * rules.max_context_ids, dtype=torch.int32, device="meta"),
        profiles=packed(persona, 2 * examples),
        persona=packed(persona),
        response=response,
        target_N=response.ids,
        infilled=packed(rules.max_response_ids) if model.auxiliary == "infilling" else None,
        persona_related_B=torch.zeros(examples, dtype=torch.int32, device="meta"),
    )
