"""MemN2N: the target persona as a memory of words, read in several hops (Sukhbaatar et al. 2015, adjacent tying).

Shape suffixes are those of :mod:`arplus.model.batch`; J is the true number of query tokens of an example.
"""

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig, VocabularySizes


class PersonaMemory(nn.Module):
    """H hops over H + 1 word tables: hop h scores with A_h = table h and reads C_h = A_{h+1} = table h + 1."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(sizes.persona_words, config.d_model) for _ in range(config.memory_hops + 1)
        )

    def forward(self, words_BK: Tensor, real_BK: Tensor, query_BSD: Tensor, length_B: Tensor) -> Tensor:
        """What the memory answers, o (B, D), of the last hop.

        The query tokens q_j are the first J = ``length_B`` positions of ``query_BSD``. A persona without any word
        gives o = 0.
        """
        # Position weights l_jk = (1 - j/J) - (k/d)(1 - 2j/J), j and k from 1, so that Σ_j l_j∘q_j is two plain sums.
        _, S, D = query_BSD.shape
        j_S = torch.arange(1, S + 1, device=query_BSD.device)
        k_D = torch.arange(1, D + 1, device=query_BSD.device) / D
        length_B1 = length_B[:, None]
        share_BS = j_S / length_B1.clamp(min=1)
        weights_B2S = torch.stack([1 - share_BS, 1 - 2 * share_BS], dim=1) * (j_S <= length_B1)[:, None]
        constant_BD, slope_BD = (weights_B2S.to(query_BSD.dtype) @ query_BSD).unbind(1)
        u_BD = constant_BD - k_D * slope_BD
        # Each hop adds o to every q_j. The next one's Σ_j l_j∘(q_j + o) is u + (Σ_j l_j)∘o, and the sum has a closed
        # form: Σ_j (1 - j/J) = (J - 1)/2 and Σ_j (1 - 2j/J) = -1 (both 0 where there is no query token at all).
        weight_sum_BD = ((length_B1 - 1) / 2 + k_D) * (length_B1 > 0)

        a_BKD = self.tables[0](words_BK)
        for table in self.tables[1:]:
            c_BKD = table(words_BK)
            score_BK = (a_BKD * u_BD[:, None]).sum(-1)
            # The lowest finite score, not -inf: a persona without words must not divide zero by zero.
            p_BK = score_BK.masked_fill(~real_BK, torch.finfo(score_BK.dtype).min).softmax(-1) * real_BK
            o_BD = (p_BK[:, :, None] * c_BKD).sum(1)
            u_BD = u_BD + weight_sum_BD * o_BD
            a_BKD = c_BKD
        return o_BD
