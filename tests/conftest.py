"""Fixtures that several folders share."""

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A real Ray cluster of two CPUs on this machine, shared by all tests that need one."""
    import ray

    from arplus import cluster

    cluster.connect(cpus=2)
    yield
    ray.shutdown()
