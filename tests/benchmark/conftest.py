"""Fixtures of the benchmarks' tests."""

import pytest


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """All of them."""
