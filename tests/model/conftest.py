"""Fixtures of the model's tests."""

import pytest
from helpers.small_models import MEMBERS, small

from arplus.config import ModelConfig


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of them."""


@pytest.fixture(params=MEMBERS)
def config(request) -> ModelConfig:
    """The members of the family, small."""
    return small(request.param)
