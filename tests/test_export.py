"""A model card's own code loads what lies beside it."""

import re
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch

from arplus import checkpoint
from arplus.checkpoint import Progress, TrainState
from arplus.config import ExportConfig, TrainConfig
from arplus.export import export
from arplus.text import Vocabulary


def test_the_cards_code_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = small_models.small("arplus")
    state = TrainState(
        config=TrainConfig(model=network),
        progress=Progress(fingerprint="f"),
        schedule={},
        characters=Vocabulary([chr(0x4E00 + i) for i in range(small_models.SIZES.characters - 9)]),
        persona_words=Vocabulary([chr(0x4E00 + i) for i in range(small_models.SIZES.persona_words - 9)]),
        weights=small_models.make_model(network).weights(),
        moments={},
    )
    source = checkpoint.write(str(tmp_path / "source"), state)
    exported = export(ExportConfig(checkpoint=source, output=str(tmp_path / "exported")))
    monkeypatch.chdir(exported)
    (code,) = re.findall(r"^    import.*?(?=^\S)", Path("README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec("if True:\n" + code, found)
    batch = small_models.make_batch(network)
    with torch.no_grad():
        ours, theirs = (m.eval()(batch).sum_dialogue for m in (checkpoint.build_model(state), found["model"]))
    assert theirs.equal(ours)
