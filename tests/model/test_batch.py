"""Packed sequences against plain Python, for any lengths and any blocks, values and gradients."""

import dataclasses
import itertools

import pytest
import torch
from helpers.small_models import make_batch, parts, small
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from arplus.model.batch import Batch, Packed, Sequences

Cut = list[list[int]]
"""The lengths of the sequences of each block."""

TENSORS = ("offsets", "sequence_N", "position_N", "slot_N", "token")


def laid(cut: Cut) -> Sequences:
    lengths = torch.tensor([n for block in cut for n in block], dtype=torch.int64)
    return Sequences.of(lengths, map(len, cut))


def rows_of(cut: Cut, width: int = 3) -> list[Tensor]:
    """Random values for the tokens of each sequence, (length, width)."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(n, width, dtype=torch.float64, generator=g) for block in cut for n in block]


def packed(rows: list[Tensor]) -> Tensor:
    return torch.cat([torch.empty(0, 3, dtype=torch.float64), *rows])


def for_any_cut(test):
    """Gives the test any lengths in any blocks, these among them."""
    for cut in ([], [[]], [[], [3], []], [[0, 0], [0]], [[0, 2], [5, 0, 1]]):
        test = example(cut)(test)
    cuts = st.lists(st.lists(st.integers(0, 5), max_size=4), max_size=4)
    return settings(max_examples=60, deadline=None)(given(cuts)(test))


@for_any_cut
def test_where_each_token_lies(cut: Cut) -> None:
    of, lengths = laid(cut), list(itertools.chain(*cut))
    assert len(of) == len(lengths)
    assert of.lengths.tolist() == lengths
    assert of.offsets.tolist() == [0, *itertools.accumulate(lengths)]
    assert of.sequence_N.tolist() == [i for i, n in enumerate(lengths) for _ in range(n)]
    assert of.position_N.tolist() == [j for n in lengths for j in range(n)]
    assert of.width == max([1, *lengths])
    if cut:
        assert [(len(block), sum(block), max([1, *block])) for block in cut] == list(of.blocks)
    assert {getattr(of, name).dtype for name in TENSORS} == {torch.int64}


@for_any_cut
def test_sums_and_what_is_spread(cut: Cut) -> None:
    of, rows = laid(cut), rows_of(cut)
    sums = torch.tensor([row.sum(0).tolist() for row in rows], dtype=torch.float64).view(len(of), 3)
    torch.testing.assert_close(of.sum(packed(rows)), sums)
    each_BD = torch.randn(len(of), 3)
    expected = [each_BD[i] for i, row in enumerate(rows) for _ in row]
    assert of.spread(each_BD).tolist() == [e.tolist() for e in expected]


@for_any_cut
def test_softmax_is_over_each_sequence(cut: Cut) -> None:
    of, rows = laid(cut), rows_of(cut)
    # Far apart, so that only a maximum of its own keeps each sequence's exponentials finite.
    scores = [200 * row[:, 0] + 1000 * (i % 3 - 1) for i, row in enumerate(rows)]
    found = of.softmax(torch.cat([torch.empty(0), *scores]).double())
    for part, score in zip(parts(found, of), scores, strict=True):
        torch.testing.assert_close(part, score.softmax(0))


@for_any_cut
def test_padded_blocks_hold_the_sequences_and_zeros(cut: Cut) -> None:
    of, rows = laid(cut), iter(rows_of(cut))
    padded = of.pad(packed(rows_of(cut)))
    assert len(padded) == len(of.blocks)
    for block, x in zip(cut, padded, strict=False):
        assert x.shape == (len(block), max([1, *block]), 3)
        for length, got in zip(block, x, strict=True):
            assert got[:length].equal(next(rows))
            assert not got[length:].any()


@for_any_cut
def test_packing_undoes_padding_and_reads_no_padding(cut: Cut) -> None:
    of, x_ND = laid(cut), packed(rows_of(cut))
    padded = of.pad(x_ND)
    assert of.pack(padded).equal(x_ND)
    real = of.pad(torch.ones_like(x_ND))
    assert of.pack(p.where(r > 0, torch.nan) for p, r in zip(padded, real, strict=True)).equal(x_ND)


@pytest.mark.parametrize("cut", [[[2, 0, 3], [], [1, 4]], [[0]], [[]]])
def test_gradients(cut: Cut) -> None:
    of = laid(cut)
    N, B = int(of.offsets[-1]), len(of)

    def leaf(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    padded = [leaf(block.sequences, block.width, 2) for block in of.blocks]
    for f, inputs in (
        (of.sum, (leaf(N, 2),)),
        (of.spread, (leaf(B, 2),)),
        (of.softmax, (leaf(N),)),
        (lambda x: tuple(of.pad(x)), (leaf(N, 2),)),
        (lambda *x: of.pack(x), tuple(padded)),
    ):
        assert torch.autograd.gradcheck(f, inputs)


def test_lengths_of_any_integer_type() -> None:
    """Generation gives floats: a step has one token per sequence."""
    for dtype in (torch.int16, torch.int32, torch.float32):
        of = Sequences.of(torch.tensor([2, 0, 3], dtype=dtype), [1, 2])
        for name in TENSORS:
            assert getattr(of, name).equal(getattr(laid([[2], [0, 3]]), name)), name


def test_lists_of_ids_end_to_end() -> None:
    ids, of = Packed.of([[5, 6], [], [7, 8, 9]], [2, 1])
    assert ids.tolist() == [5, 6, 7, 8, 9]
    assert of.lengths.tolist() == [2, 0, 3]
    assert [block.sequences for block in of.blocks] == [2, 1]
    assert Packed.of([]).ids.dtype == torch.int64


@pytest.mark.parametrize("preset", ["arplus", "ar"])
def test_a_batch_moves_to_a_device_whole(preset: str) -> None:
    """The device "meta" keeps shapes and types, so that it shows what was left behind."""

    def tensors(value) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, Packed):
            return [value.ids, *(getattr(value.sequences, name) for name in TENSORS)]
        assert value is None
        return []

    def of_batch(batch: Batch) -> list[Tensor]:
        return [t for f in dataclasses.fields(batch) for t in tensors(getattr(batch, f.name))]

    batch = make_batch(small(preset))
    moved = batch.to("meta")
    assert all(t.device.type == "meta" for t in of_batch(moved))
    assert [(t.shape, t.dtype) for t in of_batch(moved)] == [(t.shape, t.dtype) for t in of_batch(batch)]
    assert moved.context.sequences.blocks == batch.context.sequences.blocks
    assert all(a.equal(b) for a, b in zip(of_batch(batch.to("cpu")), of_batch(batch), strict=True))
