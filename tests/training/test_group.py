"""A process group that ends leaves nothing to whoever makes the next one, in this process or after this test."""

import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
import torch.distributed as dist
from helpers.engine_worker import config, engine_steps, initial_model, results

from arplus.training import engine
from arplus.training.engine import Engine
from arplus.training.group import process_group


def test_engines_of_one_process_follow_each_other(tmp_path: Path) -> None:
    """DeepSpeed holds groups of its own, which are gone with the first one."""
    variables, losses = {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys(), []
    for rendezvous in (None, tmp_path / "meet"):
        with process_group(rendezvous=rendezvous):
            c = config(zero_stage=1)
            made = Engine(initial_model(c), c, torch.device("cpu"))
            assert not made.engine.tput_timer.config.enabled, "it would wait for the GPU, twice a step"
            losses.append([result.loss for result in results(made, engine_steps(c, 0, 2))])
        assert not dist.is_initialized()
    assert losses[0] == losses[1]
    assert {"RANK", "WORLD_SIZE", "LOCAL_RANK"} & os.environ.keys() == variables


def test_a_group_ends_with_an_error() -> None:
    with pytest.raises(ZeroDivisionError), process_group():
        raise ZeroDivisionError
    assert not dist.is_initialized()


@pytest.mark.parametrize(("accelerator", "asks"), [("cpu", True), ("cuda", False)])
def test_operators_are_probed_for_a_cpu_alone(accelerator: str, asks: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe calls nvcc and gcc for each of them, in every worker."""

    class Accelerator:
        def device_name(self) -> str:
            return accelerator

    class Ops:
        asked = False

        def __getattr__(self, name: str) -> dict[str, bool]:
            self.asked = True
            return {}

    ops = Ops()
    monkeypatch.setattr(engine, "get_accelerator", Accelerator)
    monkeypatch.setattr(deepspeed, "ops", ops)
    monkeypatch.setattr(deepspeed, "init_distributed", lambda **_: None)
    with process_group():
        engine.initialise_communication()
    assert ops.asked == asks
    assert sys.modules["deepspeed.comm.comm"].cdb is None
