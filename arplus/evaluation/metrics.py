"""The standard metrics of replies, by which choices are made; :mod:`arplus.evaluation.paper_metrics` has the paper's.

Both take ids and give numbers; both are filled batch by batch and add up over workers. A new figure of these kinds is
added here; a new group of figures is a field of ``Tally``, a line of its ``result`` and a name in ``GROUPS``, all in
``evaluate.py``.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from sacrebleu.metrics import BLEU

from arplus.config import SpecialIds
from arplus.sums import SAME, Sums

Int = NDArray[np.int64]
Rows = Iterable[Sequence[int]]
"""Rows of ids: lists, or the rows of an integer array."""
MAX_ORDER = 4
"""BLEU-4."""
BLEU_SIGNATURE = "nrefs:1|case:mixed|eff:no|tok:none|smooth:exp"
"""sacrebleu's signature of the standard BLEU (its version aside), on characters: each id is a token."""


@dataclass
class NgramMatches(Sums):
    """Sums over a corpus from which BLEU is computed."""

    correct: Int = field(default_factory=lambda: np.zeros(MAX_ORDER, np.int64))
    """N-grams of the replies that are in their reference, by order; none counts oftener than in the reference."""
    total: Int = field(default_factory=lambda: np.zeros(MAX_ORDER, np.int64))
    """N-grams of the replies, by order."""
    reply_tokens: int = 0
    """Tokens of the replies."""
    reference_tokens: int = 0
    """Tokens of the references."""

    def add(self, reply: Sequence[int], reference: Sequence[int]) -> None:
        """Counts one pair."""
        for n in range(1, MAX_ORDER + 1):
            mine, theirs = Counter(ngrams(reply, n)), Counter(ngrams(reference, n))
            self.correct[n - 1] += (mine & theirs).total()
            self.total[n - 1] += mine.total()
        self.reply_tokens += len(reply)
        self.reference_tokens += len(reference)

    def bleu(self) -> float:
        """Sacrebleu's corpus BLEU, 0 … 100."""
        lengths = self.reply_tokens, self.reference_tokens
        return BLEU.compute_bleu(self.correct.tolist(), self.total.tolist(), *lengths, smooth_method="exp").score


@dataclass
class StandardMetrics(Sums):
    """Response perplexity, and replies against references on characters, without special tokens.

    A row ends at its first [EOS] or [PAD]; [BOS] is left out. [UNK] stands for some character, never for the same one:
    it matches nothing.
    """

    special: SpecialIds = field(metadata=SAME)
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
            reply = text_of(self.special, row)
            reference = text_of(self.special, reference_row)
            self.unigrams.update([*reference, self.special.eos])
            # An id that no reply has, so that [UNK] matches nothing.
            reference = [-1 if i == self.special.unk else i for i in reference]
            self.matches.add(reply, reference)
            self.f1_sum += _unigram_f1(reply, reference)
            self.replies += 1
            self.characters.update(reply)
            self.bigrams.update(pairwise(reply))
            self.bigram_count += max(len(reply) - 1, 0)

    def result(self) -> dict[str, float]:
        """The metrics by name; those of which nothing was added are left out.

        ``response_ppl`` exp of the mean L_D per target; ``unigram_ppl`` what the references' own character frequencies
        would give, which every model must be under; ``bleu`` 0 … 100, sacrebleu's corpus BLEU-4
        (:data:`BLEU_SIGNATURE`); ``f1`` 0 … 1, of the bags of characters, a mean over replies; ``distinct_1``
        and ``distinct_2`` distinct n-grams / n-grams of all replies (Li et al. 2016); ``mean_length`` characters.
        """
        result = {}
        if self.targets:
            result["response_ppl"] = exp(self.loss_sum / self.targets)
        if self.replies:
            m = self.matches
            share = np.array(list(self.unigrams.values())) / self.unigrams.total()
            result["unigram_ppl"] = exp(float(-(share * np.log(share)).sum()))
            result["bleu"] = m.bleu()
            result["f1"] = self.f1_sum / self.replies
            result["distinct_1"] = len(self.characters) / max(m.reply_tokens, 1)
            result["distinct_2"] = len(self.bigrams) / max(self.bigram_count, 1)
            result["mean_length"] = m.reply_tokens / self.replies
        return result


@dataclass
class PredictorMetrics(Sums):
    """How well a predicted persona weight a tells the examples that are about the responder's persona (r = 1)."""

    logits: list[float] = field(default_factory=list)
    """z of a = σ(z)."""
    labels: list[int] = field(default_factory=list)
    """r of each."""

    def add(self, logits: NDArray[np.floating], labels: NDArray[np.integer]) -> None:
        """Adds examples."""
        self.logits += logits.tolist()
        self.labels += labels.tolist()

    def result(self) -> dict[str, float]:
        """``share`` of r = 1, ``auc`` (the chance that z is higher at r = 1 than at r = 0), and the mean a at each r.

        Those of which there is no example are left out.
        """
        z, r = np.array(self.logits), np.array(self.labels)
        at = {f"mean_a_at_{label}": z[r == label] for label in (1, 0)}
        found: dict[str, float] = {"share": float(r.mean())} if len(r) else {}
        related, other = at.values()
        if len(related) and len(other):
            other = np.sort(other)
            below = np.searchsorted(other, related, "left") + np.searchsorted(other, related, "right")
            found["auc"] = float(below.mean() / (2 * len(other)))  # an equal one counts half
        return found | {name: float((1 / (1 + np.exp(-part))).mean()) for name, part in at.items() if len(part)}


def text_of(special: SpecialIds, row: Sequence[int]) -> list[int]:
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


def ngrams(row: Sequence[int], n: int) -> Iterable[tuple[int, ...]]:
    """The runs of ``n`` ids in a row."""
    return zip(*(row[i:] for i in range(n)), strict=False)


def exp(value: float) -> float:
    """exp, infinite where it overflows: an untrained model's perplexity may."""
    return math.exp(value) if value < 700 else math.inf
