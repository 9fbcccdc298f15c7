"""Fixtures of the evaluation's tests."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of them."""
