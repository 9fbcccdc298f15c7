"""MemN2N: the responder's persona as a memory of words, read in several hops (Sukhbaatar et al. 2015).

Shape suffixes are those of :mod:`arplus.model.batch`; J is the number of query tokens of an example.
"""

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig, VocabularySizes
from arplus.model.batch import Packed, Sequences
from arplus.model.ops import Linear


class PersonaMemory(nn.Module):
    """Adjacent tying: H hops over H + 1 word tables; hop h scores with A_h = table h and reads C_h = A_{h+1}."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.tables = nn.ModuleList(
            nn.Embedding(sizes.persona_words, config.d_model) for _ in range(config.memory_hops + 1)
        )

    def forward(self, persona: Packed, query_ND: Tensor, contexts: Sequences) -> Tensor:
        """What the memory answers, o (B, D), of the last hop.

        The query tokens q_j are the contexts' less the last of each. A persona without any word gives o = 0.
        """
        u_BD, weights_BD = _position_encoded(query_ND, contexts)
        words = persona.sequences
        a_MD = self.tables[0](persona.ids)
        for table in self.tables[1:]:
            c_MD = table(persona.ids)
            p_M = words.softmax((a_MD * words.spread(u_BD)).sum(-1))
            o_BD = words.sum(p_M[:, None] * c_MD)
            # A hop adds o to every q_j, so that Σ_j l_j∘(q_j + o) is u + (Σ_j l_j)∘o.
            u_BD, a_MD = u_BD + weights_BD * o_BD, c_MD
        return o_BD


class LayerWiseMemory(nn.Module):
    """Layer-wise tying: H hops over the same two word tables, A and C, and a linear map of the query between hops."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.hops = config.memory_hops
        self.tables = nn.ModuleList(nn.Embedding(sizes.persona_words, config.d_model) for _ in range(2))
        if self.hops > 1:
            self.query_map = Linear(config.d_model, config.d_model, bias=False)

    def forward(self, persona: Packed, query_ND: Tensor, contexts: Sequences) -> Tensor:
        """As :meth:`PersonaMemory.forward`."""
        J_B1, k_D, share_N1, is_query_N1 = _places(query_ND, contexts)
        # u is linear in the q_j by two of their sums, u = s_1 - k/d∘s_2, and a hop makes H·q_j + o of each q_j.
        s1_BD = contexts.sum((1 - share_N1) * is_query_N1 * query_ND)
        s2_BD = contexts.sum((1 - 2 * share_N1) * is_query_N1 * query_ND)
        words = persona.sequences
        a_MD, c_MD = (table(persona.ids) for table in self.tables)
        for hop in range(self.hops):
            p_M = words.softmax((a_MD * words.spread(s1_BD - k_D * s2_BD)).sum(-1))
            o_BD = words.sum(p_M[:, None] * c_MD)
            if hop < self.hops - 1:
                s1_BD = self.query_map(s1_BD) + (J_B1 - 1).clamp(min=0) / 2 * o_BD
                s2_BD = self.query_map(s2_BD) - (J_B1 > 0) * o_BD
        return o_BD


def _places(query_ND: Tensor, contexts: Sequences) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """J (B, 1), k/d (D,), and for each token j/J and whether it is a query token, (N, 1) each; j and k count from 1."""
    J_B1 = (contexts.lengths - 1)[:, None]
    J_N1 = contexts.spread(J_B1.float())
    share_N1 = (contexts.position_N + 1)[:, None] / J_N1.clamp(min=1)
    k_D = torch.arange(1, query_ND.shape[-1] + 1, device=query_ND.device) / query_ND.shape[-1]
    return J_B1, k_D, share_N1, contexts.position_N[:, None] < J_N1


def _position_encoded(query_ND: Tensor, contexts: Sequences) -> tuple[Tensor, Tensor]:
    """Σ_j l_j∘q_j and Σ_j l_j, (B, D) each, with l_jk = (1 - j/J) - (k/d)(1 - 2j/J)."""
    J_B1, k_D, share_N1, is_query_N1 = _places(query_ND, contexts)
    l_ND = ((1 - share_N1) - k_D * (1 - 2 * share_N1)) * is_query_N1
    # Its closed form: Σ_j (1 - j/J) = (J - 1)/2 and Σ_j (1 - 2j/J) = -1, both 0 where there is no query token at all.
    weights_BD = ((J_B1 - 1) / 2 + k_D) * (J_B1 > 0)
    return contexts.sum(l_ND * query_ND), weights_BD
