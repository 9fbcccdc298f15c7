"""Fixtures of the benchmarks' tests."""

from collections.abc import Iterator

import pytest
import torch.distributed as dist


@pytest.fixture
def process_group() -> Iterator[None]:
    """Whatever process group the test makes ends with it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
