"""What is found for all micro-batches at once is what the model's own code finds for each."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from arplus.data.collate import MicroBatches, narrow
from arplus.data.packing import BLOCK_SHARES, ONE_BLOCK, block_sizes, sequences, unpack
from arplus.data.ragged import Lists
from arplus.model.batch import Sequences

TENSORS = ("offsets", "sequence_N", "position_N", "slot_N", "token")
micro_batches = st.lists(st.lists(st.integers(0, 9), max_size=12), max_size=5)


@given(micro_batches, st.sampled_from([BLOCK_SHARES, ONE_BLOCK, (0.5, 0.5)]))
def test_sequences_at_once_are_those_one_by_one(lengths: list[list[int]], shares: tuple[float, ...]) -> None:
    flat = np.array([n for part in lengths for n in part], np.int64)
    found, tokens = sequences(flat, np.array([len(part) for part in lengths], np.int64), shares)
    assert tokens == [sum(part) for part in lengths]
    for together, part in zip(found, lengths, strict=True):
        alone = Sequences.of(torch.tensor(part, dtype=torch.int64), [block.sequences for block in together.blocks])
        assert together.blocks == alone.blocks
        for name in TENSORS:
            a, b = getattr(together, name), getattr(alone, name)
            assert a.dtype == b.dtype == torch.int64, name
            assert torch.equal(a, b), name


@given(st.lists(st.integers(0, 300), max_size=6))
def test_blocks_hold_all_examples_and_are_about_as_large_as_their_shares(examples: list[int]) -> None:
    sizes = block_sizes(np.array(examples, np.int64), BLOCK_SHARES)
    assert sizes.sum(1).tolist() == examples
    assert (sizes >= 0).all()
    assert (abs(sizes - np.outer(examples, BLOCK_SHARES)) <= 1).all()


def test_sixty_four_examples_are_four_blocks() -> None:
    assert block_sizes(np.array([64, 3, 0]), BLOCK_SHARES).tolist() == [[35, 19, 10], [2, 1, 0], [0, 0, 0]]


def flat() -> MicroBatches:
    """Two examples, none, and one; an example of [2, 1] profiles each."""
    three = Lists(np.arange(6), np.array([1, 2, 3]))
    return MicroBatches(
        examples=np.array([2, 0, 1]),
        profile_counts=np.array([3, 0, 1]),
        example_id=np.array([7, 2**62, 5]),
        context=three,
        speaker=np.array([0, 2, 2, 0, 0, 0]),
        profiles=Lists(np.arange(300, 308), np.array([2, 2, 2, 2])),
        persona=three,
        response=three,
        target=np.arange(70_000, 70_006),
        infilled=None,
    )


def tensors(batch: Any) -> list[torch.Tensor]:
    """All tensors in a batch."""
    if isinstance(batch, torch.Tensor):
        return [batch]
    values = vars(batch).values() if hasattr(batch, "__dict__") else batch if isinstance(batch, tuple) else ()
    return [tensor for value in values for tensor in tensors(value)]


@pytest.mark.parametrize("form", [flat(), flat().narrowed()], ids=["wide", "narrow"])
def test_a_micro_batch_without_examples_lies_between_others(form: MicroBatches) -> None:
    first, none, last = unpack(form)
    assert first.example_id_B.tolist() == [7, 2**62]
    assert first.profiles.ids.tolist() == [300, 301, 302, 303, 304, 305]
    assert first.speaker_N.tolist() == [0, 2, 2]
    assert last.context.ids.tolist() == [3, 4, 5]
    assert last.target_N.tolist() == [70_003, 70_004, 70_005]
    assert last.infilled is None
    for packed in (none.context, none.profiles, none.persona, none.response):
        assert (len(packed.ids), len(packed.sequences), packed.sequences.width) == (0, 0, 1)
        assert packed.sequences.pad(torch.zeros(0, 3))[0].shape == (0, 1, 3)
    assert len(none.example_id_B) == len(none.speaker_N) == len(none.target_N) == 0


def test_numbers_travel_in_the_smallest_type_that_holds_them() -> None:
    assert [narrow(np.array(a, np.int64)).dtype for a in ([], [0, 255], [256], [70_000], [2**62])] == [
        np.uint8,
        np.uint8,
        np.uint16,
        np.uint32,
        np.uint64,
    ]


def test_each_field_is_pinned_once_for_all_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:  # without a GPU there is no pinned memory
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    batches = list(unpack(flat(), pin=True))
    found = {t.untyped_storage().data_ptr() for batch in batches for t in tensors(batch)}
    assert found == {tensor.untyped_storage().data_ptr() for tensor in pinned}
    assert len(pinned) == 3 + 4 * 6  # ids and example ids, targets, speakers; four fields of ids and five tensors
