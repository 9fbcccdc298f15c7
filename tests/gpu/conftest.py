"""Fixtures of the tests on a GPU. ``make gpu`` runs them; ``pytest -m gpu --device cpu tests`` rehearses them."""

from collections.abc import Iterator

import pytest
import torch

from arplus.training.group import process_group


@pytest.fixture
def group(gpu: torch.device) -> Iterator[None]:
    """This process is the one worker of a process group: NCCL refuses two on one GPU."""
    with process_group():
        yield
