"""The weight predictor: a, how much a reply owes to the persona (Eq. 1; Zheng et al. 2020).

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig, VocabularySizes, special_ids
from arplus.model.batch import Packed


class WeightPredictor(nn.Module):
    """a = σ(z) with z = w·h + c, one a per example; h is a mean over its context.

    A softmax over two logits, as in their code, is the same with twice the weights. Without a MemN2N memory h is the
    mean of all that is given; with one, that of the last utterance, in which alone a question for the persona stands.
    """

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(config.d_model))
        self.c = nn.Parameter(torch.zeros(1))
        self.sep = special_ids(sizes.characters).sep if config.memory_hops else None

    def forward(self, x_ND: Tensor, context: Packed) -> Tensor:
        """Gives z (B,); of a context without any token it is c."""
        of = context.sequences
        counted_N = torch.ones_like(context.ids) if self.sep is None else _last_utterance(context, self.sep)
        counted_N1 = counted_N[:, None].to(self.w.dtype)
        # In the weights' precision, whatever autocast made of x.
        h_BD = of.sum(x_ND.to(self.w.dtype) * counted_N1) / of.sum(counted_N1).clamp(min=1)
        return (h_BD * self.w).sum(-1) + self.c


def _last_utterance(context: Packed, sep: int) -> Tensor:
    """Which tokens are of the last utterance of their context, with its [SEP], (N,)."""
    of = context.sequences
    ends_N = context.ids == sep
    utterance_N = ends_N.cumsum(0) - ends_N.long()
    return utterance_N == utterance_N[of.offsets[1:] - 1][of.sequence_N]
