"""Where Ray puts workers that ask for kinds of GPUs, labels and shares; a process of its own, with a folder.

The cluster is three nodes of this machine, with GPUs that nobody has to own: Ray only counts them. Prints what was
seen, as JSON.
"""

import json
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ray
from prepared import random_state, write_dataset
from ray._private import state
from ray.cluster_utils import Cluster
from ray.train.torch import TorchConfig
from ray.util import placement_group, placement_group_table, remove_placement_group

from arplus.cluster import placement
from arplus.cluster.scaling import size_workers
from arplus.config import EvaluateConfig, PlacementConfig, TrainConfig, TuneConfig
from arplus.errors import ArplusError
from arplus.evaluation import evaluate
from arplus.runs import checkpoint
from arplus.study.slots import find_slots
from arplus.training import workers

NODES: dict[str, dict[str, Any]] = {
    "head": {"num_cpus": 2},
    "l4": {"num_cpus": 2, "num_gpus": 2, "resources": {"accelerator_type:L4": 1}, "labels": {"zone": "a"}},
    "a100": {"num_cpus": 1, "num_gpus": 1, "resources": {"accelerator_type:A100": 1}, "labels": {"zone": "b"}},
}
A100, NONE = PlacementConfig(accelerator_type="A100"), PlacementConfig(accelerator_type="H100")
REFUSED: dict[str, dict[str, Any]] = {
    "no such GPU": {"placement": NONE},
    "two workers, one such GPU": {"workers": 2, "placement": A100},
    "a shared GPU": {"workers": 2, "placement": PlacementConfig(gpus_per_worker=0.5)},
    "no such label": {"placement": PlacementConfig(label_selector=("zone=c",))},
    "too few CPUs": {"cpus_per_worker": 2, "device": "cpu", "placement": PlacementConfig(label_selector=("zone=b",))},
}
SELECTORS = ("zone=a", "zone=!a", "zone=in(a,b)", "zone=!in(a,b)", "zone=!in(a, c)")


def nodes_of_ray(chosen: PlacementConfig, number: int) -> tuple[list[str], bool]:
    """The nodes on which Ray puts one worker each, and whether it finds room for one more."""

    def group(size: int) -> Any:
        bundles = [{"CPU": 0.01}] * size
        return placement_group(bundles, strategy="STRICT_SPREAD", bundle_label_selector=[chosen.labels] * size)

    fitting, larger = group(number), group(number + 1)
    assert fitting.wait(30)
    table: dict[str, Any] = placement_group_table(fitting)
    found = sorted(table["bundles_to_node_id"].values()), larger.wait(1)
    for each in (fitting, larger):
        remove_placement_group(each)
    return found


def look(arguments: dict[str, Any]) -> tuple[str, list[int]]:
    """This worker's node and its GPUs, once as many workers are there as are to be seen side by side."""
    folder = Path(arguments["folder"])
    (folder / arguments["name"]).write_text("")
    deadline = time.monotonic() + 60
    while len(list(folder.iterdir())) < arguments["together"]:
        assert time.monotonic() < deadline, "the others never came"
        time.sleep(0.1)
    return ray.get_runtime_context().get_node_id(), [int(i) for i in ray.get_gpu_ids()]


def train(config: TrainConfig, folder: Path, name: str, together: int = 1) -> Any:
    """Node and GPUs of a worker that Ray Train starts as it starts those of a run."""
    begun = folder / f"begun-{together}"
    begun.mkdir(exist_ok=True)
    arguments = {"folder": str(begun), "name": name, "together": together}
    return workers.run(look, arguments, size_workers(config), str(folder / name), timeout_minutes=1)


def seen(folder: Path) -> dict[str, Any]:
    """What is asked for, and where it goes."""
    zones = {kind.get("labels", {}).get("zone"): name for name, kind in NODES.items()}
    names = {node["NodeID"]: zones[node["Labels"].get("zone")] for node in ray.nodes()}
    found: dict[str, Any] = {"qualify": {}, "refused": {}}
    for selector in SELECTORS:
        chosen = PlacementConfig(label_selector=(selector,))
        ours = sorted(node["NodeID"] for node in ray.nodes() if placement.qualifies(node, chosen))
        rays, more = nodes_of_ray(chosen, len(ours))
        found["qualify"][selector] = sorted(names[node] for node in ours), rays == ours and not more
    for name, changes in REFUSED.items():
        try:
            size_workers(TrainConfig(**changes))
        except ArplusError as error:
            found["refused"][name] = error.exit_code, str(error)
    share = TrainConfig(placement=PlacementConfig(gpus_per_worker=0.5, accelerator_type="A100"))
    found["side by side"] = find_slots(TuneConfig(run=share), 8).side_by_side
    labelled = TrainConfig(workers=2, placement=PlacementConfig(label_selector=("zone=a",)))
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(train, share, folder, f"run-{i}", 2) for i in range(2)]
        runs.append(pool.submit(train, labelled, folder, "labelled"))
        *found["shared"], found["labelled"] = [(names[node], gpus) for node, gpus in (run.result() for run in runs)]
    found["evaluated"] = evaluated(folder, names)
    return found


def evaluated(folder: Path, names: dict[str, str]) -> list[str]:
    """The nodes of the actors that evaluated three windows, where each may have half of an A100."""
    vars(evaluate)["WINDOW_BATCHES"] = 1
    data = write_dataset(folder / "data", {"train": [[1]], "valid": [[1]], "test": [[140]]})
    model = checkpoint.write(str(folder / "checkpoint"), random_state())
    share = PlacementConfig(gpus_per_worker=0.5, accelerator_type="A100")
    result = evaluate.evaluate(EvaluateConfig(checkpoint=model, data=data.uri, placement=share))
    assert result["splits"]["test"]["examples"] == 140
    actors = [actor for actor in state.actors().values() if "MapWorker" in actor["ActorClassName"]]
    return sorted(names[actor["Address"]["NodeID"]] for actor in actors)


if __name__ == "__main__":
    vars(workers)["TorchConfig"] = partial(TorchConfig, backend="gloo")  # NCCL needs GPUs that are there
    head, *others = NODES.values()
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        for kind in others:
            cluster.add_node(**kind)
        ray.init(cluster.address, logging_level=logging.WARNING)
        result = seen(Path(sys.argv[1]))
        ray.shutdown()
    finally:
        cluster.shutdown()
    sys.stdout.write(json.dumps(result))
