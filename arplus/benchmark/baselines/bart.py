"""Hugging Face's BART with our width, depth and vocabulary: what a project would take that writes no model itself.

It answers the context alone: no persona, no auxiliary task.
"""

import os
from typing import Any

from torch import Tensor, nn

from arplus.benchmark.baselines.padded import Padded
from arplus.config import ModelConfig, VocabularySizes, special_ids


class Bart(nn.Module):
    """Calling it on a batch gives L_D. Raises ImportError where ``transformers`` is not installed."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read at import: nothing here needs the network
        from transformers import BartConfig, BartForConditionalGeneration

        ids = special_ids(sizes.characters)
        self.pad = ids.pad
        shape: dict[str, Any] = {"layers": config.layers, "attention_heads": config.heads, "ffn_dim": config.ff_size}
        settings: Any = BartConfig(
            vocab_size=sizes.characters,
            d_model=config.d_model,
            **{f"{side}_{name}": value for side in ("encoder", "decoder") for name, value in shape.items()},
            activation_function="relu",
            dropout=config.dropout,
            attention_dropout=config.dropout,
            max_position_embeddings=128,
            pad_token_id=ids.pad,
            bos_token_id=ids.bos,
            eos_token_id=ids.eos,
            decoder_start_token_id=ids.bos,
            forced_eos_token_id=None,
            use_cache=False,
        )
        self.model: Any = BartForConditionalGeneration(settings)

    def forward(self, batch: Padded) -> Tensor:
        """L_D, the mean over the targets that are not padding."""
        context_BS, target_BT = batch.context_BS.long(), batch.target_BT.long()
        loss: Tensor = self.model(
            input_ids=context_BS,
            attention_mask=(context_BS != self.pad).long(),
            decoder_input_ids=batch.response_BT.long(),
            labels=target_BT.masked_fill(target_BT == self.pad, -100),
        ).loss
        return loss
