"""A batch of examples as tensors: what the feed hands to the model, and nothing else.

Dimensions, here and in every shape-suffixed name of this package:
    B examples, S context characters, T response ids, U infilled ids, P profiles, W words a profile,
    K words (or characters) of the target persona, D width d_model, E embedding size, H heads, V vocabulary,
    N real targets of a batch.

Padding is the [PAD] id of the vocabulary that a tensor's ids belong to, and always follows the real ids.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Examples as integer tensors (int32 or int64), padded on the right.

    Persona ids are words of the persona vocabulary for a model with a MemN2N memory, else characters.
    """

    example_id_B: Tensor
    """Stable ids (int64)."""
    counted_B: Tensor
    """False for a row that only fills a batch up: it repeats an example and enters no loss and no metric."""
    context_BS: Tensor
    """Context characters; every utterance is followed by [SEP]."""
    context_profile_BS: Tensor
    """For each context position, the profile in 0 … P-1 of who speaks; 0 where the context is padding."""
    profiles_BPW: Tensor
    """Gender, place and tags of every profile, without the keys."""
    target_persona_BK: Tensor
    """The responder's persona with its keys: 性别 … 地址 … 兴趣 …"""
    response_BT: Tensor
    """[BOS] … [EOS]"""
    infilled_BU: Tensor | None
    """The response with a span replaced by one [MASK] (auxiliary task "infilling"), else None."""

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device; copies from pinned memory do not block."""
        tensors = ((f.name, getattr(self, f.name)) for f in fields(self))
        return replace(self, **{k: v.to(device, non_blocking=True) for k, v in tensors if v is not None})
