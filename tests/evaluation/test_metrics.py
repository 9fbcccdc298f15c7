"""BLEU, F1, distinct and the rest by hand, and beside sacreBLEU and the paper's code."""

import math
from functools import partial

import numpy as np
import pytest
from sacrebleu.metrics import BLEU

from arplus.config import special_ids
from arplus.evaluation.metrics import BLEU_SIGNATURE, PredictorMetrics, StandardMetrics
from arplus.evaluation.paper_metrics import PaperMetrics

IDS = special_ids(109)  # characters 0 … 99


def standard(replies, references):
    metrics = StandardMetrics(IDS)
    metrics.add(replies, references)
    return metrics.result()


def random_batches(rng, batches=6, size=7):
    def row():
        return [*rng.integers(12, size=rng.integers(1, 16)).tolist(), IDS.eos]

    return [([row() for _ in range(size)], [row() for _ in range(size)]) for _ in range(batches)]


def test_standard_metrics_of_a_case_by_hand():
    result = standard([[1, 2, 2, 3], [4]], [[2, 2, 2, 5, 1], [6]])
    # Common bag {1, 2, 2}: F1 = 2 · 3 / (4 + 5); the second reply shares nothing.
    assert result["f1"] == pytest.approx((6 / 9 + 0) / 2)
    assert result["distinct_1"] == 4 / 5
    assert result["distinct_2"] == 3 / 3
    assert result["mean_length"] == 2.5


def test_distinct_is_of_the_corpus_not_of_a_reply():
    result = standard([[1, 2], [1, 2]], [[3], [3]])
    assert (result["distinct_1"], result["distinct_2"]) == (2 / 4, 1 / 2)


def test_standard_bleu_is_sacrebleus_of_the_characters():
    rng = np.random.default_rng(0)
    (replies, references), *_ = random_batches(rng, 1, 50)
    text = [[" ".join(f"c{i}" for i in row[:-1]) for row in rows] for rows in (replies, references)]
    bleu = BLEU(tokenize="none")
    expected = bleu.corpus_score(text[0], [text[1]])
    assert expected.score > 1
    assert standard(replies, references)["bleu"] == pytest.approx(expected.score)
    assert str(bleu.get_signature()).startswith(BLEU_SIGNATURE + "|version:")


def test_perfect_replies():
    rows = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    result = standard(rows, rows)
    assert result["bleu"] == pytest.approx(100)
    assert result["f1"] == 1


def test_special_tokens_and_padding_count_nowhere():
    plain = standard([[1, 2, 3], [4, 5]], [[1, 2, 3, 9], [5]])
    padded = standard(
        np.array([[IDS.bos, 1, 2, 3, IDS.eos], [IDS.bos, 4, 5, IDS.eos, IDS.pad]]),
        np.array([[1, 2, 3, 9, IDS.eos], [5, IDS.eos, IDS.pad, IDS.pad, IDS.pad]]),
    )
    assert padded == plain


def test_an_unknown_character_is_no_match():
    result = standard([[IDS.unk] * 4], [[IDS.unk] * 4])
    assert (result["f1"], result["bleu"]) == (0, 0)
    one_of_two = standard([[1, IDS.unk]], [[1, IDS.unk]])
    assert one_of_two["f1"] == 0.5


def test_an_empty_reply_scores_nothing():
    result = standard([[IDS.eos]], [[1, IDS.eos]])
    assert result.pop("unigram_ppl") == pytest.approx(2), "one character and [EOS], half each"
    assert result == {"bleu": 0, "f1": 0, "distinct_1": 0, "distinct_2": 0, "mean_length": 0}


def test_response_ppl_is_weighted_by_targets():
    metrics = StandardMetrics(IDS)
    metrics.add_loss(2 * math.log(3), 2)
    metrics.add_loss(8 * math.log(5), 8)
    assert metrics.result() == {"response_ppl": pytest.approx(3**0.2 * 5**0.8)}
    metrics.add_loss(1e9, 1)
    assert metrics.result()["response_ppl"] == math.inf


def test_a_predictor_is_measured_by_hand():
    whole, other = PredictorMetrics(), PredictorMetrics()
    whole.add(np.array([math.log(3), 0.0]), np.array([1, 0]))
    other.add(np.array([0.0, -math.log(4), math.log(4)]), np.array([1, 0, 0]))
    assert (whole + other).result() == pytest.approx(
        {
            "share": 0.4,
            "auc": (2 + 1.5) / 6,  # of six pairs: one equal, and 4/5 is above 3/4 and 1/2
            "mean_a_at_1": (0.75 + 0.5) / 2,
            "mean_a_at_0": (0.5 + 0.2 + 0.8) / 3,
        }
    )
    assert PredictorMetrics().result() == {}
    none = PredictorMetrics([0.0], [0])
    assert none.result() == {"share": 0.0, "mean_a_at_0": 0.5}, "as on real data"


def test_replies_and_references_must_be_as_many():
    with pytest.raises(ValueError, match="longer than"):
        standard([[1]], [[1], [2]])


@pytest.mark.parametrize("kind", [StandardMetrics, partial(PaperMetrics, width=16)], ids=["standard", "paper"])
def test_workers_merge_to_the_whole_in_any_order(kind):
    rng = np.random.default_rng(1)
    whole, parts = kind(IDS), []
    for replies, references in random_batches(rng):
        losses = (float(rng.random() * 50), int(rng.integers(1, 30)))
        parts.append(kind(IDS))
        for metrics in (whole, parts[-1]):
            metrics.add(replies, references)
            metrics.add_loss(*losses)
    a, b, c, *rest = parts
    merged = kind(IDS) + c + (a + b)
    for part in reversed(rest):
        merged = part + merged
    assert merged.result() == pytest.approx(whole.result())
    assert len(whole.result()) >= 5


def test_paper_ppl_mixes_both_losses_and_means_over_batches():
    metrics = PaperMetrics(IDS, 16)
    metrics.add_loss(4.0, 2.0)
    metrics.add_loss(2.0, 2.0)
    assert metrics.result() == {"paper_ppl": pytest.approx(math.exp((5 + 3) / 2))}


def test_paper_bleu_punishes_a_perfect_reply():
    metrics = PaperMetrics(IDS, 16)
    row = [*range(9), IDS.eos]
    metrics.add([row], [row])
    # Ten tokens against a reference of sixteen: nothing but the brevity penalty.
    assert metrics.result()["paper_bleu"] == pytest.approx(math.exp(1 - 16 / 10))


def test_paper_f1_counts_positions_and_all_ids():
    metrics = PaperMetrics(IDS, width=3)
    metrics.add([[1, 2]], [[2, 2]])
    # Padded [1, 2, EOS] and [2, 2, EOS]: id 2 has F1 2 · 1 / 3, [EOS] has 1, the other classes 0.
    assert metrics.result()["paper_f1"] == pytest.approx((2 / 3 + 1) / (IDS.eos + 1))


def test_paper_distinct_counts_eos_and_divides_by_tokens():
    metrics = PaperMetrics(IDS, 16)
    metrics.add([[1, 1, 1, IDS.eos, IDS.pad]], [[1]])
    result = metrics.result()
    assert (result["paper_distinct_1"], result["paper_distinct_2"]) == (2 / 4, 2 / 4)
