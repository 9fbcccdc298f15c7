"""The paper-compatible metrics against the values that the paper's code computed."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from arplus.config import SpecialIds
from arplus.evaluation.paper_metrics import PaperMetrics, paper_bleu, paper_distinct, paper_f1

GOLDEN = json.loads((Path(os.environ.get("ARPLUS_GOLDEN", "tests/golden")) / "metrics.json").read_text())
CASES = GOLDEN["metrics"]
TOLERANCE = 1e-6  # the stored values come from 32-bit arithmetic


def special(case):
    """The cases end replies with one id and pad with another; the other special tokens do not occur."""
    eos = case["pred"][0][-1]
    pad = next(i for row in case["pred_padded"] for i in row[row.index(eos) + 1 :])
    return SpecialIds(pad=pad, bos=-1, eos=eos, unk=-1, sep=-1, spe1=-1, spe2=-1, mask=-1, cls=-1)


@pytest.mark.parametrize("case", CASES)
def test_functions_give_the_stored_values(case):
    ids = special(case)
    predictions, targets = np.array(case["pred_padded"]), np.array(case["target_padded"])
    unpadded = [[i for i in row if i != ids.pad] for row in case["target_padded"]]
    assert paper_bleu(case["pred"], case["target_padded"]) == pytest.approx(case["bleu"], rel=TOLERANCE)
    assert paper_bleu(case["pred"], unpadded) == pytest.approx(case["bleu_unpadded_target"], rel=TOLERANCE)
    assert paper_f1(predictions, targets) == pytest.approx(case["f1"], rel=TOLERANCE)
    assert max(predictions.max(), targets.max()) + 1 == case["num_classes"]
    for n, expected in (1, case["dist1"]), (2, case["dist2"]):
        assert np.mean([paper_distinct(row, n) for row in case["pred"]]) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize("case", CASES)
def test_the_accumulator_gives_the_stored_values(case):
    metrics = PaperMetrics(special(case), width=len(case["target_padded"][0]))
    metrics.add(case["pred_padded"], case["target_padded"])
    expected = {
        "paper_bleu": case["bleu"],
        "paper_f1": case["f1"],
        "paper_distinct_1": case["dist1"],
        "paper_distinct_2": case["dist2"],
    }
    assert metrics.result() == pytest.approx(expected, rel=TOLERANCE)


def test_macro_f1_of_perfect_replies_is_tiny():
    golden = GOLDEN["f1_perfect_prediction_real_ids"]
    ids = np.array(golden["ids"])
    assert paper_f1(ids, ids) == pytest.approx(golden["f1"], rel=TOLERANCE)
    assert ids.max() + 1 == golden["num_classes"]
