"""A run's folder: its files by name, and its patience with storage that is away."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.checkpoints import final_metrics

from arplus.config import preset, tiny
from arplus.errors import UsageError
from arplus.runs.folder import RunFolder

FINAL = final_metrics(valid={"loss": 3.5, "examples": 7})


def test_final_metrics_are_flat_in_the_file(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    assert run.final.find() is None
    run.final.write(FINAL)
    text = (tmp_path / "final_metrics.json").read_text()
    values = json.loads(text)
    assert values == FINAL.flat()
    assert (values["valid/loss"], values["valid/examples"], "valid" in values) == (3.5, 7, False)
    assert run.final.read() == FINAL
    assert run.final.text(run.final.read()) == text, "a whole number stays one"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"respones_ppl": 3.0}, "unknown key 'respones_ppl' \\(did you mean 'best_response_ppl'\\?\\)"),
        ({"steps": "many"}, "--steps: must be a valid integer.* \\(got 'many'\\)"),
        ({"valid/loss": "low"}, "--valid.* \\(got 'low'\\)"),
    ],
)
def test_what_is_no_metric_is_refused_by_name(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    (tmp_path / "final_metrics.json").write_text(json.dumps(FINAL.flat() | changes))
    with pytest.raises(UsageError, match=f"^{tmp_path}/final_metrics.json: {said}"):
        RunFolder(str(tmp_path)).final.read()


def test_all_of_it_waits_for_storage_that_refuses(s3_server: Any, tmp_path: Path, refusing: Callable[[], Any]) -> None:
    run = RunFolder(s3_server.uri(tmp_path.name))
    config = tiny(preset("arplus"))
    for use in (
        lambda: run.config.write(config),
        lambda: run.start_attempt(run.take_over("m")),
        lambda: run.checkpoints.newest(),
    ):
        with refusing():
            use()
    assert run.config.read() == config
    attempt = run.read_attempt()
    assert attempt is not None
    assert attempt.number == 1
