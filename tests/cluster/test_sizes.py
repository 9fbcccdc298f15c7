"""How many workers a run has and what each gets: it fits on the cluster, or is refused with the sum."""

import json

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_put

from arplus.cluster import connection, scaling
from arplus.cluster.scaling import size_workers
from arplus.config import TrainConfig
from arplus.errors import ResourceError

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.mark.parametrize(
    ("workers", "asked", "cpus"),
    [(1, 1, 1.0), (2, 2, 0.5), (4, 4, 0.25), (3, 3, 0.3333), ("1:4", (1, 4), 0.25), ("1:3", (1, 3), 0.3125)],
)
def test_workers_leave_one_of_two_cpus_to_the_feed(workers: int | str, asked: object, cpus: float) -> None:
    found = size_workers(TrainConfig(workers=workers))
    assert found.num_workers == asked
    assert found.resources_per_worker == {"CPU": cpus}


@pytest.mark.parametrize(("nodes", "of_each", "workers", "share"), [(2, 2, 4, 0.5), (3, 4, 8, 1.0), (2, 8, 20, 0.7)])
def test_the_feed_has_a_whole_cpu_wherever_the_workers_go(
    monkeypatch: pytest.MonkeyPatch, nodes: int, of_each: int, workers: int, share: float
) -> None:
    """With as many CPUs left as there are nodes, one node at least has a whole one."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": of_each}}] * nodes)
    monkeypatch.setattr(connection, "offer", lambda *_: connection.Offer(nodes * of_each, 0))
    found = size_workers(TrainConfig(workers=workers))
    assert found.resources_per_worker == {"CPU": share}
    assert nodes * of_each - workers * share >= nodes


def test_more_workers_than_there_is_room_for_are_right_where_fewer_do() -> None:
    found = size_workers(TrainConfig(workers="2:40", batch_size=64))
    assert found.num_workers == (2, 40)
    assert found.resources_per_worker == {"CPU": 0.1875}, "a sixteenth less than the smallest share or equal to it"


@pytest.mark.parametrize("workers", [8, "8:9"])
def test_too_few_cpus_are_refused_with_the_sum(workers: int | str) -> None:
    sum_ = r"8 workers × 0.2 CPUs \+ 1 CPU for the data feed = 2.6 CPUs, and the cluster has 2; take at most 5 workers"
    with pytest.raises(ResourceError, match=f"--workers {workers}: {sum_}"):
        size_workers(TrainConfig(workers=workers))


def test_the_drivers_own_cpus_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """`ray job submit` leaves the job's id with the driver, and what it reserves with the cluster."""
    settings = {"metadata": {"job_submission_id": "sized"}}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(settings))
    assert scaling.driver_cpus() == 0
    key = "_ray_internal_job_info_sized"
    _internal_kv_put(key, json.dumps({"entrypoint_num_cpus": 1.0}), namespace="job")
    with pytest.raises(ResourceError, match=r"\+ 1 CPUs for the job's driver .*= 2.2 CPUs, and the cluster has 2; it"):
        size_workers(TrainConfig())
    _internal_kv_del(key, namespace="job")  # the dashboard would stumble over it
