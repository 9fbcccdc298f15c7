"""The estimate of ``--dry-run`` is what engines are seen to hold, at every stage and with one and two workers."""

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers.engine_worker import SIZES, config, global_batch, initial_model, memory

from arplus.config import ExampleRules, TrainConfig, VocabularySizes, preset
from arplus.model.cost import train_only
from arplus.training import footprint as estimate
from arplus.training.footprint import activation_bytes, checkpoint_bytes, state_bytes, worker_bytes


def larger(**changes: object) -> TrainConfig:
    """A model of 1.3 M parameters with grouped layers, so that its state outweighs the activations of one example."""
    c = config("arplus", **changes)
    model = replace(c.model, layers=4, repeats=2, d_model=256, heads=4, embedding_size=200, ff_size=512)
    return replace(c, model=replace(model, ff_bottleneck=200))


@pytest.mark.parametrize(("workers", "only"), [(1, ()), (2, ()), (2, ("attention", "feed-forward", "norms and gates"))])
def test_the_train_state_is_what_an_engine_holds(
    spawn: Callable, workers: int, only: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = [larger(workers=workers, zero_stage=stage) for stage in range(4)]
    configs = [replace(c, optimizer=replace(c.optimizer, only=only)) for c in configs]
    model = initial_model(configs[0])
    train_only(model, only)
    sizes, frozen = ([p.numel() for p in model.parameters() if p.requires_grad is kind] for kind in (True, False))
    n, weights, bucket = sum(sizes), sum(sizes) + sum(frozen), 420_000
    monkeypatch.setattr(estimate, "BUCKET", bucket)  # room for two of the largest, as the formula of stage 3 has it
    counted = spawn(workers, memory, configs, bucket)
    # Between steps: weights, moments and, with ZeRO, fp32 masters.
    for (between, _), elements in zip(counted[:3], [weights + 2 * n, *2 * [weights + 3 * n / workers]], strict=True):
        assert between == pytest.approx(4 * elements, rel=0.02)
    activations = _activations(configs[0]) / 8
    for stage, (_, peak) in enumerate(counted):
        estimated = state_bytes(stage, workers, sizes, frozen) + activations
        assert 0.75 * estimated <= peak <= 1.05 * estimated, f"stage {stage}: {peak / estimated:.2f}"


def _activations(c: TrainConfig) -> int:
    """What a whole batch of the engine's tests keeps for its backward pass."""
    kept = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept.add(tensor.untyped_storage())
        return tensor

    model = initial_model(c)
    weights = {p.untyped_storage() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(global_batch(c.model, 0))
    return sum(storage.nbytes() for storage in kept - weights)


@pytest.mark.parametrize("name", ["arplus", "ar"])
def test_activations_are_those_that_a_forward_pass_keeps(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    c = config(name)
    batch = global_batch(c.model, 0)
    persona = "PERSONA_WORDS" if c.model.memory_hops else "PERSONA_CHARACTERS"
    monkeypatch.setattr(estimate, persona, batch.persona.sequences.width)
    lengths: Any = SimpleNamespace(
        max_context_ids=batch.context.sequences.width, max_response_ids=batch.response.sequences.width + 1
    )
    estimated = activation_bytes(c.model, SIZES, lengths, len(batch.example_id_B))
    # Kernels of the CPU keep less or more than the formulas that torch takes without a device.
    assert 0.6 * estimated <= _activations(c) <= 1.1 * estimated


def test_activations_grow_with_the_micro_batch_and_state_does_not() -> None:
    model, sizes = preset("arplus").model, VocabularySizes()
    one, two = (activation_bytes(model, sizes, ExampleRules(), examples) for examples in (8, 16))
    assert one < two < 2.05 * one


def test_every_stage_and_every_number_of_workers_is_estimated() -> None:
    run = replace(preset("arplus-large"), workers="2:4")
    found = worker_bytes(run, VocabularySizes())
    assert found.keys() == {(stage, workers) for stage in range(4) for workers in (2, 3, 4)}
    assert found[1, 4] < found[1, 2] < found[0, 2] + found[1, 2]
    assert found[3, 4] < found[1, 4]


def test_a_checkpoint_is_weights_and_two_moments() -> None:
    assert checkpoint_bytes(preset("arplus").model, VocabularySizes()) == 12 * 31_142_449
    one = checkpoint_bytes(preset("arplus").model, VocabularySizes(), ("norms and gates",))
    assert one == 4 * 31_142_449 + 8 * 1_025, "frozen parameters have no moments"
