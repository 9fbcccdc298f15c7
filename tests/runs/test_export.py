"""A model card's own code loads what lies beside it, and an export deletes nothing but its predecessor."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import small_models

from arplus.config import ExampleRules, ExportConfig, TrainConfig
from arplus.errors import UsageError
from arplus.runs import checkpoint
from arplus.runs.checkpoint import TrainProgress, TrainState
from arplus.runs.export import export
from arplus.text import Vocabulary


def small_state() -> TrainState:
    network = small_models.small("arplus")
    return TrainState(
        config=TrainConfig(model=network),
        progress=TrainProgress(fingerprint="f"),
        schedule={},
        rules=ExampleRules(),
        characters=Vocabulary([chr(0x4E00 + i) for i in range(small_models.SIZES.characters - 9)]),
        persona_words=Vocabulary([chr(0x4E00 + i) for i in range(small_models.SIZES.persona_words - 9)]),
        weights=small_models.make_model(network).weights(),
        moments={},
    )


def test_the_cards_code_loads_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small_state()
    source = checkpoint.write(str(tmp_path / "source"), state)
    exported = export(ExportConfig(checkpoint=source, output=str(tmp_path / "exported")))
    monkeypatch.chdir(exported)
    (code,) = re.findall(r"^    import.*?(?=^\S)", Path("README.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    found: dict[str, Any] = {}
    exec("if True:\n" + code, found)
    batch = small_models.make_batch(state.config.model)
    with torch.no_grad():
        ours, theirs = (m.eval()(batch).sum_dialogue for m in (checkpoint.build_model(state), found["model"]))
    assert theirs.equal(ours)


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("foreign", ["notes.txt", "exported/notes.txt", "exported/more/README.md", "other/README.md"])
def test_an_output_with_other_files_is_refused_and_stays(tmp_path: Path, foreign: str) -> None:
    source = checkpoint.write(str(tmp_path / "run/checkpoints/step-00000001"), small_state())
    export(ExportConfig(checkpoint=source, output=str(tmp_path / "exported")))
    path = tmp_path / foreign
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    before = files(tmp_path)
    output = str(tmp_path / foreign.split("/")[0])
    with pytest.raises(UsageError, match=rf"--output {output}: .* name a new or an empty folder"):
        export(ExportConfig(checkpoint=source, output=output))
    assert files(tmp_path) == before


def test_an_export_may_be_written_again_but_not_over_its_source(tmp_path: Path) -> None:
    source = checkpoint.write(str(tmp_path / "run/checkpoints/step-00000001"), small_state())
    output = str(tmp_path / "exported")
    export(ExportConfig(checkpoint=source, output=output))
    export(ExportConfig(checkpoint=source, output=output))
    (tmp_path / "link").symlink_to(output)
    before = files(tmp_path)
    for given, target in (
        (output, output),
        (f"file://{output}", str(tmp_path / "link")),
        (str(tmp_path / "run"), source),
        (str(tmp_path / "run"), str(tmp_path / "run")),
    ):
        with pytest.raises(UsageError, match=f"--output {target}: would replace the --checkpoint itself"):
            export(ExportConfig(checkpoint=given, output=target))
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("golden", "form"),
    [
        ("x_unshared", {"shared_stacks": False, "repeats": 3}),
        ("x_layer_wise", {"memory_tying": "layer-wise", "memory_hops": 3}),
    ],
)
def test_other_forms_of_the_papers_code_are_recognised(tmp_path: Path, golden: str, form: dict[str, Any]) -> None:
    for name, size in (("characters", 50), ("persona_words", 60)):
        (tmp_path / name).write_bytes(Vocabulary([chr(0x4E00 + i) for i in range(size)]).to_bytes())
    exported = export(
        ExportConfig(
            from_reference=str(Path(__file__).parents[1] / "golden" / f"{golden}.safetensors"),
            layers=3,
            heads=2,
            character_vocabulary=str(tmp_path / "characters"),
            persona_vocabulary=str(tmp_path / "persona_words"),
            output=str(tmp_path / "exported"),
        )
    )
    state = checkpoint.load(exported)
    assert form.items() <= vars(state.config.model).items()
    checkpoint.build_model(state)
