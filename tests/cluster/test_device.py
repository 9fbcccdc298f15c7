"""``--device`` on real clusters: what is alive, what is only asked for, and that evaluation waits without hanging."""

import json
from typing import Any

import pytest
import ray
from helpers.commands import run_worker
from helpers.prepared import random_state, write_dataset

from arplus.cluster import connection
from arplus.errors import ResourceError
from arplus.runs import checkpoint

EXAMPLES = 150
ON_CPUS = [2, False, {"CPU": 0.5}]
ON_GPUS = [2, True, {"CPU": 1.0, "GPU": 1}]


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory, forked_workers: None) -> dict[str, Any]:
    """An evaluation of three windows, so that there is work for as many workers."""
    folder = tmp_path_factory.mktemp("evaluation")
    dataset = write_dataset(folder / "data", {"train": [[9]], "valid": [[9]], "test": [[EXAMPLES]]})
    return {
        "checkpoint": checkpoint.write(str(folder / "checkpoint"), random_state()),
        "data": dataset.uri,
        "batch_size": 1,
    }


def on_a_cluster(settings: dict[str, Any], cpus: int, gpus: int, joining: int) -> dict[str, Any]:
    """What ``device_worker.py`` prints; it hangs where Ray does, and is then ended."""
    return run_worker("device_worker.py", cpus, gpus, joining, given=json.dumps(settings), timeout=150)


@pytest.mark.soak
def test_gpus_are_asked_for_where_none_is_alive(settings: dict[str, Any]) -> None:
    """A cluster that scales to zero: a head of two CPUs, and a GPU node that joins while the evaluation waits.

    Half a minute.
    """
    found = on_a_cluster(settings | {"device": "gpu"}, cpus=2, gpus=0, joining=1)
    assert found["scaling"] == {"auto": ON_CPUS, "cpu": ON_CPUS, "gpu": ON_GPUS}
    assert found["side_by_side"] == {"auto": 1, "cpu": 1, "gpu": 1}
    assert found["two_asked_for"][:2] == [2, 1.0]
    assert found["compile"] == [False, True, False]
    assert found["examples"] == EXAMPLES
    assert found["waited"]
    assert [line for line in found["said"] if "GPU" in line][:2] == [
        "no GPU of the cluster is alive, so this runs on CPUs; --device gpu asks its autoscaler for GPUs",
        "--device gpu: 0 of 2 GPUs are alive; waiting until the cluster has started the rest",
    ]


def test_evaluation_with_as_many_gpus_as_cpus_leaves_cpus_to_the_reads(settings: dict[str, Any]) -> None:
    found = on_a_cluster(settings, cpus=2, gpus=2, joining=0)
    on_gpus = [2, True, {"CPU": 0.5, "GPU": 1}]
    assert found["scaling"] == {"auto": on_gpus, "cpu": ON_CPUS, "gpu": on_gpus}, "the sum holds for GPUs that live"
    assert found["side_by_side"] == {"auto": 1, "cpu": 1, "gpu": 1}
    assert found["examples"] == EXAMPLES


@pytest.mark.usefixtures("ray_cluster")
def test_a_machine_without_gpus_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="--device gpu: this machine has no GPU; leave it out, or submit"):
        connection.offer("gpu", 1)
    assert connection.offer("auto", 1) == connection.offer("cpu", 1) == (2.0, 0)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    assert connection.offer("gpu", 4) == (8.0, 1), "no more will come, so the sum refuses it"
