"""What the paper's code computed, to compare with its tables. No choice is made by it.

Its "PPL" mixes two losses, its "BLEU" scores [EOS] and compares with padded references, its "F1" is a macro average
over all ids of what stands at the same positions.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from arplus.config import SpecialIds
from arplus.evaluation.metrics import MAX_ORDER, NgramMatches, Rows, exp, ngrams, text_of
from arplus.sums import SAME, Sums


@dataclass
class PaperMetrics(Sums):
    """The metrics of the paper's code, each a mean over batches (Dist over replies).

    They depend on how examples fall into batches, so only the paper's batches of 64 give its numbers. ``add`` pads
    replies and references to one width, that of the longest row of the batch or ``width``.
    """

    special: SpecialIds = field(metadata=SAME)
    """Special ids of the character vocabulary."""
    width: int = field(metadata=SAME)
    """Least width of the padded rows: the longest utterance of the data (15 characters in the paper) and [EOS]."""
    batches: int = 0
    """Number of batches with replies."""
    bleu_sum: float = 0.0
    """Sum of the batches' BLEU."""
    f1_sum: float = 0.0
    """Sum of the batches' F1."""
    replies: int = 0
    """Number of replies."""
    distinct_1_sum: float = 0.0
    """Sum of the replies' Dist-1."""
    distinct_2_sum: float = 0.0
    """Sum of the replies' Dist-2."""
    loss_batches: int = 0
    """Number of batches with losses."""
    loss_sum: float = 0.0
    """Sum of the batches' L_D + 0.5 · L_LM."""

    def add_loss(self, dialogue_loss: float, auxiliary_loss: float) -> None:
        """Adds one batch's mean losses, L_D and L_LM, in nats."""
        self.loss_sum += float(dialogue_loss) + 0.5 * float(auxiliary_loss)
        self.loss_batches += 1

    def add(self, replies: Rows, references: Rows) -> None:
        """Adds one batch: replies and references, each up to and with its [EOS]; [PAD] after it is allowed."""
        predictions = [self._with_eos(row) for row in replies]
        targets = [self._with_eos(row) for row in references]
        assert len(predictions) == len(targets)
        if not predictions:
            return
        width = max(self.width, *map(len, predictions), *map(len, targets))
        padded_predictions, padded_targets = (self._padded(rows, width) for rows in (predictions, targets))
        self.bleu_sum += paper_bleu(predictions, padded_targets.tolist())
        self.f1_sum += paper_f1(padded_predictions, padded_targets)
        self.distinct_1_sum += sum(paper_distinct(row, 1) for row in predictions)
        self.distinct_2_sum += sum(paper_distinct(row, 2) for row in predictions)
        self.batches += 1
        self.replies += len(predictions)

    def result(self) -> dict[str, float]:
        """``paper_ppl``, ``paper_bleu``, ``paper_f1``, ``paper_distinct_1``, ``paper_distinct_2``; all but PPL 0 … 1.

        Those of which nothing was added are left out.
        """
        result = {}
        if self.loss_batches:
            result["paper_ppl"] = exp(self.loss_sum / self.loss_batches)
        if self.batches:
            result["paper_bleu"] = self.bleu_sum / self.batches
            result["paper_f1"] = self.f1_sum / self.batches
            result["paper_distinct_1"] = self.distinct_1_sum / self.replies
            result["paper_distinct_2"] = self.distinct_2_sum / self.replies
        return result

    def _with_eos(self, row: Sequence[int]) -> list[int]:
        """The row without [BOS] and [PAD], with exactly one [EOS], at its end."""
        return [*text_of(self.special, row), self.special.eos]

    def _padded(self, rows: list[list[int]], width: int) -> np.ndarray:
        padded = np.full((len(rows), width), self.special.pad)
        for target, row in zip(padded, rows, strict=True):
            target[: len(row)] = row
        return padded


def paper_bleu(replies: Rows, references: Rows) -> float:
    """Corpus BLEU-4 of one batch as torchtext's ``bleu_score`` has it, 0 … 1: no smoothing, 0 without a common 4-gram.

    The paper's code gives it replies with [EOS], and references with [EOS] and [PAD].
    """
    matches = NgramMatches()
    for reply, reference in zip(replies, references, strict=True):
        matches.add(reply, reference)
    if not all(matches.correct):
        return 0.0
    precision = sum(math.log(correct / total) for correct, total in zip(matches.correct, matches.total, strict=True))
    brevity = min(1 - matches.reference_tokens / matches.reply_tokens, 0.0)
    return math.exp(precision / MAX_ORDER + brevity)


def paper_f1(predictions: np.ndarray, targets: np.ndarray) -> float:
    """Macro F1, position by position, over the classes 0 … largest id; a class that is nowhere scores 0.

    Both arrays hold the padded ids of one batch, of one shape; [EOS] and [PAD] are classes too.
    """
    predictions, targets = np.ravel(predictions), np.ravel(targets)
    classes = max(predictions.max(), targets.max()) + 1
    right = np.bincount(targets[predictions == targets], minlength=classes)
    seen = np.bincount(predictions, minlength=classes) + np.bincount(targets, minlength=classes)
    return float(np.mean(2 * right / np.maximum(seen, 1)))


def paper_distinct(reply: Sequence[int], n: int) -> float:
    """Distinct n-grams of one reply, [EOS] included, over its number of tokens (of tokens, not of n-grams)."""
    return len(set(ngrams(reply, n))) / len(reply)
