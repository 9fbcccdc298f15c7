"""Which of the private names of Ray, DeepSpeed and torch that we take an upgrade has moved."""

import ast
import importlib
import inspect
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FILES = {
    "ray": "arplus.cluster.ray_private",
    "deepspeed": "arplus.training.deepspeed_private",
    "torch": "arplus.torch_private",
}
"""Library → the one file that takes what it does not offer."""
_ZERO = "deepspeed.runtime.zero"
TAKEN = {
    "ray": {
        "bootstrap_address": ["ray._private.services.canonicalize_bootstrap_address"],
        "node_addresses": ["ray._raylet.GcsClient", "ray._raylet.InnerGcsClient.get_all_node_info"],
        "read_variables_again": ["ray._raylet.Config.initialize"],
        "start_workers_without_uv": ["ray._private.ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV"],
        "runs_the_head": ["ray._private.worker.global_worker.node", "ray._private.node.Node.is_head"],
        "logs_folder": ["ray._private.worker._global_node", "ray._private.node.Node.get_logs_dir_path"],
        "submitted_job": [
            "ray.dashboard.modules.job.common.JOB_ID_METADATA_KEY",
            "ray.dashboard.modules.job.common.JobInfoStorageClient.JOB_DATA_KEY",
            "ray.experimental.internal_kv._internal_kv_get",
        ],
        "draining_nodes": ["ray._private.state.state.get_draining_nodes"],
        "autoscaling_coordinator": [
            f"ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator.{name}"
            for name in ("get_or_create_autoscaling_coordinator", "ResourceRequestPriority.HIGH")
        ],
        "mute_reports": [
            "ray.train.v2._internal.execution.context",
            "ray.data._internal.progress",
            "ray.tune.utils.util.warn_if_slow",
            "ray.tune.analysis.experiment_analysis",
        ],
        "choose_worker_lines": [
            f"ray._private.ray_logging.global_worker_stdstream_dispatcher.{name}"
            for name in ("handlers", "add_handler", "remove_handler")
        ],
        "deaf_to_the_terminal": ["ray._private.services.ConsolePopen"],
        "keep_keys_out_of_trials": ["ray.tune.execution.class_cache.ENV_VARS_TO_PROPAGATE"],
        "progress_bar": ["ray.experimental.tqdm_ray.tqdm"],
    },
    "deepspeed": {
        "leave_shm_out": ["deepspeed.ops.__compatible_ops__"],
        "reduce_gradients": ["deepspeed.runtime.engine.DeepSpeedEngine.enable_backward_allreduce"],
        "tell_before_reduction": ["deepspeed.runtime.engine.DeepSpeedEngine.allreduce_gradients"],
        "data_parallel_group": ["deepspeed.runtime.engine.DeepSpeedEngine.seq_data_parallel_group"],
        "fp32_partitions": [
            f"{_ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer.single_partition_of_fp32_groups",
            f"{_ZERO}.stage3.DeepSpeedZeroOptimizer_Stage3.fp32_partitioned_groups_flat",
        ],
        "link_moments": [f"{_ZERO}.stage_1_and_2.DeepSpeedZeroOptimizer._lazy_init_hp_params_optimizer_state"],
        "full_shape": [f"{_ZERO}.partition_parameters.Init.ds_shape"],
        "end_groups": ["deepspeed.comm.comm.cdb", "deepspeed.comm.comm.destroy_process_group"],
    },
    "torch": {
        "onednn_linear": ["torch.ops.mkldnn._linear_pointwise"],
        "leave_update_out": ["torch.optim.adam.Adam.found_inf"],
        "default_store": ["torch.distributed.distributed_c10d._get_default_store"],
        "set_timeout": ["torch.distributed.distributed_c10d._set_pg_timeout"],
        "record_allocations": ["torch.cuda.memory._record_memory_history"],
        "dump_allocations": ["torch.cuda.memory._dump_snapshot", "torch.cuda.memory._record_memory_history"],
    },
}
"""Library → our function → the names that it takes; the last part may be what a class gives its instances."""


def look_up(name: str) -> Any:
    """What has that name. Raises ImportError or AttributeError where nothing has it."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for i, part in enumerate(parts[1:], 1):
        if inspect.ismodule(found) and not hasattr(found, part):
            found = importlib.import_module(".".join(parts[: i + 1]))
        elif inspect.isclass(found) and not hasattr(found, part) and re.search(rf"[.\"]{part}\b", source_of(found)):
            return None  # instances have it
        else:
            found = getattr(found, part)
    return found


def source_of(found: type) -> str:
    module = inspect.getmodule(found)
    assert module is not None
    return inspect.getsource(module)


def pinned(library: str) -> str:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in pins if line.startswith(f"{library}=="))


@pytest.mark.parametrize(("library", "function"), [(lib, name) for lib, names in TAKEN.items() for name in names])
def test_what_a_function_takes_is_there(library: str, function: str) -> None:
    for name in TAKEN[library][function]:
        try:
            look_up(name)
        except (ImportError, AttributeError, OSError) as error:
            pytest.fail(
                f"{FILES[library]}.{function}: {library} {version(library)} has no {name} ({error}); "
                f"constraints.txt pins {library} {pinned(library)}"
            )


@pytest.mark.parametrize("library", FILES)
def test_every_function_was_read_in_the_version_that_is_pinned(library: str) -> None:
    """A name may stay where it was and mean another thing."""
    module = importlib.import_module(FILES[library])
    functions = {name for name, f in vars(module).items() if inspect.isfunction(f) and f.__module__ == module.__name__}
    assert functions == TAKEN[library].keys()
    assert pinned(library) == module.READ_IN, (
        f"{library} is pinned to {pinned(library)}: read there what {FILES[library]} relies on, then set READ_IN"
    )


def test_a_name_that_moved_is_told() -> None:
    for name in ("ray._private.nowhere", "ray._private.node.Node.is_tail", "torch.ops.mkldnn._nothing"):
        with pytest.raises((ImportError, AttributeError)):
            look_up(name)


def private_names(path: Path) -> list[str]:
    """Private names that a file takes of another module or object than its own, and private parts of libraries."""
    found, text = [], path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            names = [f"{module}.{alias.name}".strip(".") for alias in node.names]
            inside = (".execution", ".experimental", ".dashboard", "._")
            found += [n for n in names if n.split(".")[0] in FILES and any(part in f".{n}" for part in inside)]
        elif isinstance(node, ast.Attribute) and re.match("_[^_]", node.attr):
            tuples = ("_asdict", "_replace", "_make", "_fields")  # public, whatever they are called
            if node.attr not in tuples and not re.search(rf"(self|cls)\.{node.attr}\b|def {node.attr}\b", text):
                found.append(ast.unparse(node))
    return found


def test_no_other_file_takes_a_private_name() -> None:
    own = {name.replace(".", "/") + ".py" for name in FILES.values()}
    files = [f.relative_to(ROOT) for folder in ("arplus", "jobs") for f in (ROOT / folder).rglob("*.py")]
    found = {str(f): names for f in files if str(f) not in own and (names := private_names(ROOT / f))}
    assert found == {}
    assert all(private_names(ROOT / file) for file in own), "the search finds what is there"
