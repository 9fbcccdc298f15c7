"""Fixtures of the model's tests."""

import pytest
import torch
from small_models import small

from arplus.config import PAPER_ROWS, ModelConfig


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(PAPER_ROWS))
def config(request) -> ModelConfig:
    """Each of the paper's rows, small."""
    return small(request.param)
