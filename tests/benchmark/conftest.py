"""Fixtures of the benchmarks' tests."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist


@pytest.fixture
def process_group() -> Iterator[None]:
    """Whatever process group the test makes ends with it."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
