"""A batch that is filled up to a capacity computes what it did, and batches of one capacity are of one shape."""

import pytest
import torch
from helpers.small_models import WEIGHTED, gradients, make_batch, make_model, small, take
from torch._dynamo.testing import CompileCounterWithBackend

from arplus import kernels
from arplus.config import PAPER_ROWS, ExampleRules
from arplus.data.capacity import MULTIPLE, Capacity, Filler, fill
from arplus.model.batch import Batch

RULES = ExampleRules(max_utterance_characters=8, max_context_utterances=3)


def shapes(batch: Batch) -> list[object]:
    """All that a compiled model sees of a batch before its values."""
    found: list[object] = [batch.speaker_N.shape, batch.target_N.shape]
    found.append(batch.persona_related_B is not None and batch.persona_related_B.shape)
    for packed in (batch.context, batch.profiles, batch.persona, batch.response, batch.infilled):
        if packed is not None:
            s = packed.sequences
            found += [packed.ids.shape, s.offsets.shape, s.slot_N.shape, s.token.shape, s.blocks]
    return found


@pytest.mark.parametrize("backend", ["cpu", "cuda"])
@pytest.mark.parametrize("preset", sorted({*PAPER_ROWS, *WEIGHTED}))
def test_losses_and_gradients_stay(preset: str, backend: str) -> None:
    config = small(preset)
    model = make_model(config).double()
    kernels.use(model, torch.device(backend))
    batch = make_batch(config)
    needed = Capacity.needed(batch)

    def found(of: Batch) -> list[torch.Tensor]:
        losses = model(of)
        return [*losses.together(), *(gradient.clone() for gradient in gradients(model, losses).values())]

    expected = found(batch)
    for capacity in (needed, Capacity(*(n + 70 for n in needed))):
        for filled, plain in zip(found(fill(batch, capacity, 9, RULES)), expected, strict=True):
            torch.testing.assert_close(filled, plain, atol=1e-9, rtol=1e-9)


def test_batches_of_one_capacity_are_of_one_shape_and_none_is_dropped() -> None:
    config = small("arplus-weighted")
    batches = [make_batch(config, examples, seed) for seed in range(30) for examples in (5, 6)]
    batches.append(make_batch(config, 9, seed=99))
    filler = Filler(RULES, examples=9)
    filled = filler(batches[:60])
    assert len({str(shapes(batch)) for batch in filled}) == len(filler.capacities) == 1
    assert all(n % MULTIPLE == 0 for n in filler.capacities[0])
    large = batches[-1]
    filler.capacities = [Capacity.needed(batches[0])]
    (grown,) = filler([large])
    assert len(filler.capacities) > 1
    assert grown.example_id_B.equal(large.example_id_B)
    assert len(grown.context.ids) == filler.capacities[-1].context
    assert filler(batches[:1])[0].context.ids.shape == (filler.capacities[0].context,)


@pytest.mark.timeout(60)
def test_a_first_batch_without_examples_leaves_room_to_grow() -> None:
    """That of a worker whose share of the last batch is empty, where a run goes on at an epoch's last step."""
    config = small("arplus")
    filler = Filler(RULES, examples=9)
    filler([take(make_batch(config), [])])
    batch = make_batch(config, 9)
    assert filler([batch])[0].example_id_B.equal(batch.example_id_B)


@pytest.mark.processes
def test_compiled_it_is_one_graph() -> None:
    """By Dynamo and autograd's tracer, without the compiler, which takes minutes."""
    config = small("arplus")
    model = make_model(config).train()
    kernels.use(model, torch.device("cuda"))
    batches = Filler(RULES, examples=6)([make_batch(config, seed=seed) for seed in range(3)])
    counted = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counted, fullgraph=True, dynamic=False)
    for batch in batches:
        losses, plain = compiled(batch), model(batch)
        torch.testing.assert_close(tuple(losses), tuple(plain))
        (losses.sum_dialogue + losses.sum_auxiliary).backward()
    assert counted.frame_count == 1
