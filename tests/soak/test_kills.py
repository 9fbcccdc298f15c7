"""The long proofs that a run survives its workers: about 45 minutes on two busy cores."""

import random
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import audits, faults
from helpers.prepared import write_dataset

from arplus.config import TrainConfig
from arplus.training.trainer import train

EXAMPLES = 500
STEPS = 2 * 63

pytestmark = [pytest.mark.soak, pytest.mark.timeout(1200), pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    files = {"train": [[200, 100], [200]], "valid": [[300]]}
    return write_dataset(tmp_path_factory.mktemp("data"), files).uri


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("storage")


def settings(data: str, storage: Path, **changes: object) -> TrainConfig:
    """Checkpoints and validations so often that a good part of the kills falls into them."""
    return faults.settings(data, storage, checkpoint_every=3, validate_every=20, **changes)


@pytest.fixture(scope="module")
def undisturbed(data: str, storage: Path) -> dict[str, torch.Tensor]:
    """The final weights of a run that nothing happens to."""
    config = settings(data, storage, run_name="undisturbed")
    train(config)
    return faults.newest_weights(config)


@pytest.mark.parametrize("seed", range(20))
def test_a_kill_at_any_moment_changes_nothing(
    data: str, storage: Path, undisturbed: dict[str, torch.Tensor], seed: int
) -> None:
    """At a random time of a random step: in the step, in a save or in a validation."""
    chance = random.Random(seed)
    step, delay, which = chance.randrange(1, round(0.85 * STEPS)), chance.uniform(0, 0.5), chance.randrange(2)
    config = settings(data, storage, run_name=f"killed-{seed}")

    def kill() -> None:
        time.sleep(delay)
        faults.kill_a_worker(which)

    with faults.disturbed(kill, lambda: faults.steps_logged(config) >= step):
        final = train(config)
    assert faults.attempts(config) == 2
    assert final.steps == STEPS
    found = faults.newest_weights(config)
    assert all(torch.equal(found[name], value) for name, value in undisturbed.items())
    assert audits.find_problems(str(faults.folder(config)), np.arange(EXAMPLES), 2) == []


def test_five_kills_then_one_worker_then_four(data: str, storage: Path) -> None:
    config = settings(data, storage, run_name="five", max_steps=90)
    config = replace(config, model=replace(config.model, dropout=0.0))
    chance = random.Random(5)
    with ExitStack() as kills:
        faults.kill_in_turn(config, kills, chance.sample(range(1, 85), 5), chance)
        assert train(config).steps == 90
    assert faults.attempts(config) == 6
    assert train(replace(config, workers=1, max_steps=105)).steps == 105
    assert train(replace(config, workers=4, zero_stage=3, max_steps=None)).steps == STEPS
    assert audits.find_problems(str(faults.folder(config)), np.arange(EXAMPLES), 2) == []
