"""Two sets of metrics, never to be confused: standard ones, and those that the paper's code computed.

:class:`StandardMetrics` is what choices are made by. :class:`PaperMetrics` exists to compare with the paper's tables:
its "PPL" mixes two losses, its "BLEU" scores [EOS] and compares with padded references, its "F1" is a macro average
over all ids of what stands at the same positions. Both take ids and give numbers; both are filled batch by batch and
merged from several workers.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from sacrebleu.metrics import BLEU

from arplus.config import SpecialIds

Rows = Iterable[Sequence[int]]
"""Rows of ids: lists, or the rows of an integer array."""
MAX_ORDER = 4
"""BLEU-4."""
HONEST_BLEU_SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:none|smooth:exp"
"""sacrebleu's signature of the standard BLEU (its version aside), on characters: each id is a token."""


@dataclass
class NgramMatches:
    """Sums over a corpus from which BLEU is computed."""

    correct: list[int] = field(default_factory=lambda: [0] * MAX_ORDER)
    """N-grams of the replies that are in their reference, by order; none counts oftener than in the reference."""
    total: list[int] = field(default_factory=lambda: [0] * MAX_ORDER)
    """N-grams of the replies, by order."""
    reply_tokens: int = 0
    """Tokens of the replies."""
    reference_tokens: int = 0
    """Tokens of the references."""

    def add(self, reply: Sequence[int], reference: Sequence[int]) -> None:
        """Counts one pair."""
        for n in range(1, MAX_ORDER + 1):
            mine, theirs = Counter(_ngrams(reply, n)), Counter(_ngrams(reference, n))
            self.correct[n - 1] += (mine & theirs).total()
            self.total[n - 1] += mine.total()
        self.reply_tokens += len(reply)
        self.reference_tokens += len(reference)

    def __add__(self, other: "NgramMatches") -> "NgramMatches":
        return NgramMatches(
            [a + b for a, b in zip(self.correct, other.correct, strict=True)],
            [a + b for a, b in zip(self.total, other.total, strict=True)],
            self.reply_tokens + other.reply_tokens,
            self.reference_tokens + other.reference_tokens,
        )


# ------------------------------------------------------------------------------------------------------- standard


@dataclass
class StandardMetrics:
    """Response perplexity, and replies against references on characters, without special tokens.

    A row ends at its first [EOS] or [PAD]; [BOS] is left out. [UNK] stands for some character, never for the same one:
    it matches nothing.
    """

    special: SpecialIds
    """Special ids of the character vocabulary."""
    loss_sum: float = 0.0
    """Sum of L_D over targets, in nats."""
    targets: int = 0
    """Number of targets, [EOS] included."""
    replies: int = 0
    """Number of replies."""
    f1_sum: float = 0.0
    """Sum of the replies' F1."""
    matches: NgramMatches = field(default_factory=NgramMatches)
    """What BLEU is computed from."""
    characters: set[int] = field(default_factory=set)
    """Distinct characters of the replies."""
    bigrams: set[tuple[int, int]] = field(default_factory=set)
    """Distinct pairs of neighbours in the replies."""
    bigram_count: int = 0
    """Number of such pairs."""
    unigrams: Counter[int] = field(default_factory=Counter)
    """Characters of the references, and an [EOS] for each."""

    def add_loss(self, loss_sum: float, targets: int) -> None:
        """Adds a sum of L_D in nats and the number of its targets."""
        self.loss_sum += float(loss_sum)
        self.targets += int(targets)

    def add(self, replies: Rows, references: Rows) -> None:
        """Adds replies (B rows of ids) and the reference of each."""
        for row, reference_row in zip(replies, references, strict=True):
            reply = _text(self.special, row)
            reference = _text(self.special, reference_row)
            self.unigrams.update([*reference, self.special.eos])
            # An id that no reply has, so that [UNK] matches nothing.
            reference = [-1 if i == self.special.unk else i for i in reference]
            self.matches.add(reply, reference)
            self.f1_sum += _unigram_f1(reply, reference)
            self.replies += 1
            self.characters.update(reply)
            self.bigrams.update(pairwise(reply))
            self.bigram_count += max(len(reply) - 1, 0)

    def merge(self, other: "StandardMetrics") -> "StandardMetrics":
        """The metrics of both parts together; the order of parts does not matter."""
        assert self.special == other.special
        return StandardMetrics(
            self.special,
            self.loss_sum + other.loss_sum,
            self.targets + other.targets,
            self.replies + other.replies,
            self.f1_sum + other.f1_sum,
            self.matches + other.matches,
            self.characters | other.characters,
            self.bigrams | other.bigrams,
            self.bigram_count + other.bigram_count,
            self.unigrams + other.unigrams,
        )

    def result(self) -> dict[str, float]:
        """The metrics by name; those of which nothing was added are left out.

        ``response_ppl`` exp of the mean L_D a target; ``unigram_ppl`` what the references' own character frequencies
        would give, which every model must be under; ``bleu`` 0 … 100, sacrebleu's corpus BLEU-4
        (:data:`HONEST_BLEU_SIGNATURE`); ``f1`` 0 … 1, of the bags of characters, a mean over replies; ``distinct_1``
        and ``distinct_2`` distinct n-grams / n-grams of all replies (Li et al. 2016); ``mean_length`` characters.
        """
        result = {}
        if self.targets:
            result["response_ppl"] = _exp(self.loss_sum / self.targets)
        if self.replies:
            m = self.matches
            share = np.array(list(self.unigrams.values())) / self.unigrams.total()
            result["unigram_ppl"] = _exp(float(-(share * np.log(share)).sum()))
            result["bleu"] = BLEU.compute_bleu(
                m.correct, m.total, m.reply_tokens, m.reference_tokens, smooth_method="exp"
            ).score
            result["f1"] = self.f1_sum / self.replies
            result["distinct_1"] = len(self.characters) / max(m.reply_tokens, 1)
            result["distinct_2"] = len(self.bigrams) / max(self.bigram_count, 1)
            result["mean_length"] = m.reply_tokens / self.replies
        return result


def _text(special: SpecialIds, row: Sequence[int]) -> list[int]:
    """The row's ids up to its first [EOS] or [PAD], without [BOS]."""
    ids = []
    for i in map(int, row):
        if i in (special.eos, special.pad):
            break
        if i != special.bos:
            ids.append(i)
    return ids


def _unigram_f1(reply: Sequence[int], reference: Sequence[int]) -> float:
    common = (Counter(reply) & Counter(reference)).total()
    return 2 * common / (len(reply) + len(reference)) if common else 0.0


# ---------------------------------------------------------------------------------------------- paper-compatible


@dataclass
class PaperMetrics:
    """The metrics of the paper's code, each a mean over batches (Dist over replies); see the verdicts of the guide.

    They depend on how examples fall into batches, so only the paper's batches of 64 give its numbers. ``add`` pads
    replies and references to one width, that of the longest row of the batch or ``width``.
    """

    special: SpecialIds
    """Special ids of the character vocabulary."""
    width: int
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

    def merge(self, other: "PaperMetrics") -> "PaperMetrics":
        """The metrics of both sets of batches together; the order of sets does not matter."""
        assert (self.special, self.width) == (other.special, other.width)
        return PaperMetrics(
            self.special,
            self.width,
            self.batches + other.batches,
            self.bleu_sum + other.bleu_sum,
            self.f1_sum + other.f1_sum,
            self.replies + other.replies,
            self.distinct_1_sum + other.distinct_1_sum,
            self.distinct_2_sum + other.distinct_2_sum,
            self.loss_batches + other.loss_batches,
            self.loss_sum + other.loss_sum,
        )

    def result(self) -> dict[str, float]:
        """``paper_ppl``, ``paper_bleu``, ``paper_f1``, ``paper_distinct_1``, ``paper_distinct_2``; all but PPL 0 … 1.

        Those of which nothing was added are left out.
        """
        result = {}
        if self.loss_batches:
            result["paper_ppl"] = _exp(self.loss_sum / self.loss_batches)
        if self.batches:
            result["paper_bleu"] = self.bleu_sum / self.batches
            result["paper_f1"] = self.f1_sum / self.batches
            result["paper_distinct_1"] = self.distinct_1_sum / self.replies
            result["paper_distinct_2"] = self.distinct_2_sum / self.replies
        return result

    def _with_eos(self, row: Sequence[int]) -> list[int]:
        """The row without [BOS] and [PAD], with exactly one [EOS], at its end."""
        return [*_text(self.special, row), self.special.eos]

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
    return len(set(_ngrams(reply, n))) / len(reply)


def _ngrams(row: Sequence[int], n: int) -> Iterable[tuple[int, ...]]:
    return zip(*(row[i:] for i in range(n)), strict=False)


def _exp(value: float) -> float:
    """exp, infinite where it overflows: an untrained model's perplexity may."""
    return math.exp(value) if value < 700 else math.inf
