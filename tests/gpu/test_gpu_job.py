"""A training job on a GPU through Ray, killed and undisturbed, and its checkpoint's evaluation there."""

import random
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from helpers import faults
from helpers.engine_worker import NOISE
from helpers.prepared import write_dataset

from arplus.config import EvaluateConfig
from arplus.evaluation.evaluate import evaluate
from arplus.training.trainer import train


@pytest.mark.gpu
@pytest.mark.timeout(600)
def test_a_killed_run_ends_as_an_undisturbed_one(ray_cluster: None, tmp_path: Path, gpu: torch.device) -> None:
    data = write_dataset(tmp_path / "data", {"train": [[50, 33], [49]], "valid": [[faults.VALID]]}).uri
    device, weights = "gpu" if gpu.type == "cuda" else "cpu", []
    for name, steps in (("whole", []), ("killed", [9])):
        c = faults.settings(data, tmp_path, run_name=name, workers=1, device=device, compile="off")
        with ExitStack() as kills:
            faults.kill_in_turn(c, kills, steps, random.Random(0))
            assert train(c).steps == faults.STEPS
        assert faults.attempts(c) == 1 + len(steps)
        weights.append(faults.newest_weights(c))
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, atol=10 * NOISE, rtol=10 * NOISE, msg=key)
    found = evaluate(EvaluateConfig(checkpoint=str(faults.folder(c)), data=data, split=("valid",), device=device))
    assert found["splits"]["valid"]["examples"] == faults.VALID
