"""Which operations a model computes with, by its device."""

import pytest
import torch
from helpers.small_models import make_model, small

from arplus import kernels
from arplus.kernels import CpuOperations
from arplus.model.ops import Module, Operations


def operations(model: torch.nn.Module) -> set[type[Operations]]:
    return {type(module.ops) for module in model.modules() if isinstance(module, Module)}


@pytest.mark.parametrize(("device", "expected"), [("cpu", CpuOperations), ("cuda:1", Operations), ("meta", Operations)])
def test_the_whole_model_computes_with_its_devices_operations_and_no_other_does(device, expected):
    model, other = make_model(small("arplus")), make_model(small("arplus"))
    kernels.use(model, torch.device(device))
    assert operations(model) == {expected}
    assert operations(other) == {Operations}
