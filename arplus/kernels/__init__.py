"""Faster ways to compute the model's operations, chosen once per device; they import the model, it imports none."""

import torch

from arplus.kernels.cpu import CpuOperations
from arplus.model.network import PersonaTransformer
from arplus.model.ops import Module, Operations

BACKENDS: dict[str, type[Operations]] = {"cpu": CpuOperations}
"""By type of device; any other, a GPU too, computes with the plain operations."""


def use(model: PersonaTransformer, device: torch.device) -> None:
    """Has a model that is, or will be, on this device compute with its operations."""
    operations = BACKENDS.get(device.type, Operations)()
    for module in model.modules():
        if isinstance(module, Module):
            module.ops = operations
