"""Fixtures of the model's tests."""

import pytest
from helpers.small_models import FORMS, WEIGHTED, small

from arplus.config import PAPER_ROWS, ModelConfig


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of them."""


@pytest.fixture(params=[*sorted({*PAPER_ROWS, *WEIGHTED}), *FORMS])
def config(request) -> ModelConfig:
    """Each of the paper's rows, those with a weight predictor, and the other forms, small."""
    return small(request.param)
