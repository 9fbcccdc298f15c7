"""What jobs take of a cluster, as a process of its own: ``device_worker.py CPUS GPUS JOINING < settings.json``.

The cluster is one node of this machine with CPUS and GPUS that nobody has to own: Ray only counts them. A node
with JOINING GPUs, if any, joins while the evaluation runs. Prints what was seen, as JSON.
"""

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import ray
from ray.cluster_utils import Cluster

from arplus.cluster import connection
from arplus.cluster.scaling import size_workers
from arplus.config import Device, EvaluateConfig, TrainConfig, TuneConfig, from_dict
from arplus.evaluation.evaluate import evaluate
from arplus.study.slots import find_slots

DEVICES = get_args(Device)


def main(local: Cluster, joining: int) -> dict[str, Any]:
    """Asks with each ``--device`` what training takes, and evaluates."""
    said = Lines()
    logging.getLogger("arplus").addHandler(said)
    logging.getLogger("arplus").setLevel(logging.INFO)
    config = from_dict(EvaluateConfig, json.load(sys.stdin), source="test")
    ray.init(local.address, logging_level=logging.WARNING)
    found: dict[str, Any] = {"scaling": {}, "side_by_side": {}}
    for device in DEVICES:
        scaling = size_workers(TrainConfig(workers=2, device=device))
        found["scaling"][device] = scaling.num_workers, scaling.use_gpu, scaling.resources_per_worker
        found["side_by_side"][device] = find_slots(
            TuneConfig(run=TrainConfig(workers=2, device=device)), 8
        ).side_by_side
    found["two_asked_for"] = find_slots(TuneConfig(run=TrainConfig(workers=2, device="gpu"), concurrency=2), 8)
    found["compile"] = [bool(connection.offer(device, 1).gpus) for device in DEVICES]
    with ThreadPoolExecutor(1) as pool:  # a node is added by the main thread alone
        evaluation = pool.submit(evaluate, config)
        if joining:
            time.sleep(5)
            found["waited"] = not evaluation.done()
            local.add_node(num_cpus=1, num_gpus=joining)
        found["examples"] = evaluation.result()["splits"]["test"]["examples"]
    return found | {"said": said.lines}


class Lines(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a line."""
        self.lines.append(record.getMessage())


if __name__ == "__main__":
    cpus, gpus, joining = map(int, sys.argv[1:])
    cluster_of_one = Cluster(initialize_head=True, head_node_args={"num_cpus": cpus, "num_gpus": gpus})
    try:
        seen = main(cluster_of_one, joining)
        ray.shutdown()
    finally:
        cluster_of_one.shutdown()
    sys.stdout.write(json.dumps(seen))
