"""The audit finds an example that was trained twice or never."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from arplus.data.loader import Step
from arplus.runs import audit
from arplus.runs.audit import Audit


class Ids:
    """As much of a batch as the audit reads."""

    def __init__(self, ids):
        self.example_id_B = torch.tensor(ids)


@pytest.fixture
def run(tmp_path):
    return str(tmp_path)


def write(run, attempt, rows, rank=0):
    """``rows``: (epoch, step, ids)."""
    written = Audit(run, attempt, rank)
    for epoch, step, ids in rows:
        written.add(epoch, step, Step([Ids(ids)], 1))
    written.flush()


def test_rows_are_written_as_documented(run, tmp_path):
    big = 2**62 + 1
    written = Audit(run, 3, 1)
    written.add(0, 7, Step([Ids([big, 5]), Ids([6])], 1))
    written.flush()
    written.flush()
    (file,) = (tmp_path / "audit").iterdir()
    table = pq.read_table(file)
    assert [str(f.type) for f in table.schema] == ["int32", "int32", "int32", "int64"]
    assert table.to_pydict() == {"attempt": [3] * 3, "epoch": [0] * 3, "step": [7] * 3, "example_id": [big, 5, 6]}


def test_flushes_do_not_overwrite_each_other(run):
    written = Audit(run, 1, 0)
    for step in range(3):
        written.add(0, step, Step([Ids([step])], 1))
        written.flush()
    assert audit.problems(run, np.arange(3), 1) == []


def test_the_last_attempt_of_a_step_counts(run):
    write(run, 1, [(0, 0, [1, 2]), (0, 1, [3, 4]), (0, 2, [5])])  # the other worker died before it wrote its [6]
    write(run, 2, [(0, 1, [4]), (0, 2, [5])])
    write(run, 2, [(0, 1, [3]), (0, 2, [6])], rank=1)
    assert len(audit.read(run)) == 6
    assert audit.problems(run, np.arange(1, 7), 1) == []


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([(0, 0, [1, 2])], "epoch 0: 1 examples missing, such as [3]"),
        ([(0, 0, [1, 2, 3, 9])], "epoch 0: 1 examples unknown, such as [9]"),
        ([(0, 0, [1, 2]), (0, 1, [3, 2])], "epoch 0: 1 examples more than once, such as [2]"),
        ([], "epoch 0: 3 examples missing, such as [1, 2, 3]"),
    ],
)
def test_what_is_not_exactly_once_is_found(run, rows, problem):
    write(run, 1, rows)
    assert audit.problems(run, np.array([1, 2, 3]), 1) == [problem]


def test_every_epoch_is_looked_at(run):
    write(run, 1, [(0, 0, [1, 2]), (1, 0, [1]), (2, 0, [1])])
    assert audit.problems(run, np.array([1, 2]), 2) == ["epoch 1: 1 examples missing, such as [2]"]
