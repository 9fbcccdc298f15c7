"""Small pretrained models, as transformers writes them, with a vocabulary of Chinese characters."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.prepared import CHARACTERS

SPECIALS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
TOKENS = [*SPECIALS, *CHARACTERS.tokens[::-1][1:], "b"]
"""All characters of the prepared data sets but the last one, in another order, and a stranger."""


def make_pretrained(folder: Path, kind: str, tokens: Sequence[str] = TOKENS, *, seed: int = 1, **changes: Any) -> Any:
    """Writes a model of a kind of transformers', such as "Bert", and returns it; every weight is random."""
    transformers = pytest.importorskip("transformers", reason="the extra 'pretrained' is not installed")
    shape = {"vocab_size": len(tokens), "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"intermediate_size": 48} | ({} if kind == "Bert" else {"embedding_size": 24})
    torch.manual_seed(seed)
    network = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**shape | changes)).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)  # from 0.02, with which a layer would do next to nothing
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
    network.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join([*tokens, ""]), encoding="utf-8")
    return network
