"""How many cores a worker takes."""

import os

import pytest

from arplus.training import workers


@pytest.mark.parametrize(("machine", "expected"), [(1, 1), (64, 2)])
def test_cores_are_the_machines_or_those_that_ray_was_given(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch, machine: int, expected: int
) -> None:
    """A container with a quota of two cores sees all of its host's; Ray, and the fixture's cluster, have two."""
    monkeypatch.setattr(os, "cpu_count", lambda: machine)
    assert workers.cores() == expected
