"""A batch as other code has it: rows that are padded to the longest of the batch, and masks made from the padding.

Shape suffixes are those of :mod:`arplus.model.batch`; W is the widest profile, K the longest persona, and S, T and U
are the longest context, response and infilled response of the batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from arplus.config import VocabularySizes, special_ids
from arplus.model.batch import Batch, Sequences


class Padded(NamedTuple):
    """The ids of a :class:`arplus.model.batch.Batch`."""

    context_BS: Tensor
    """Context characters, then [PAD]."""
    speaker_BS: Tensor
    """For each of them, which of the batch's profiles speaks; 0 at a [PAD]."""
    profiles_PW: Tensor
    """Every profile of the batch, then [PAD]."""
    persona_BK: Tensor
    """The responder's persona, then [PAD]."""
    response_BT: Tensor
    """[BOS] and the characters of the response, then [PAD]."""
    target_BT: Tensor
    """What follows each of them: the characters and [EOS], then [PAD]."""
    infilled_BU: Tensor | None
    """[BOS] … [EOS] with a span replaced by one [MASK], then [PAD]; None where the task is another."""

    @classmethod
    def of(cls, batch: Batch, sizes: VocabularySizes) -> "Padded":
        """A packed batch of a model whose personas are made of words."""
        pad, persona_pad = special_ids(sizes.characters).pad, special_ids(sizes.persona_words).pad

        def rows(values_N: Tensor, of: Sequences, filler: int) -> Tensor:
            return pad_sequence(list(values_N.split(of.lengths.tolist())), batch_first=True, padding_value=filler)

        context, response = batch.context.sequences, batch.response.sequences
        return cls(
            context_BS=rows(batch.context.ids, context, pad),
            speaker_BS=rows(batch.speaker_N, context, 0),
            profiles_PW=rows(*batch.profiles, persona_pad),
            persona_BK=rows(*batch.persona, persona_pad),
            response_BT=rows(batch.response.ids, response, pad),
            target_BT=rows(batch.target_N, response, pad),
            infilled_BU=None if batch.infilled is None else rows(*batch.infilled, pad),
        )

    def to(self, device: torch.device | str) -> "Padded":
        """The same on another device."""
        return Padded._make(None if tensor is None else tensor.to(device) for tensor in self)
