"""What a node of the cluster is asked before it trains: its versions, its space, and whether it reaches the storage.

Ray runs :func:`probe` on every node, so that this module imports little.
"""

import hashlib
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import NamedTuple

from arplus import __version__, storage
from arplus.errors import ArplusError, ResourceError

PACKAGES = ("ray", "torch", "deepspeed")
SLOW_BF16 = (
    "--precision bf16: this processor has no bf16 instructions (avx512_bf16, amx_bf16 or Arm's bf16), so that training "
    "takes several times as long as in fp32; take --precision fp32, or auto"
)
"""Measured: the tiny model trains at 18 examples per second instead of 140 on a processor with AVX2 alone."""


class NodeReport(NamedTuple):
    """What a node said."""

    versions: dict[str, str]
    """Python, the packages that compute together, and a hash of this project's own code."""
    free_disk: int
    """Free bytes where temporary files go, which is where Ray keeps its logs and spills objects."""
    free_shm: int
    """Free bytes of /dev/shm, where Ray's object store and NCCL live."""
    bf16: bool
    """Whether its processor multiplies in bf16."""
    problems: list[str]
    """Why the node cannot read the data or write to the storage; nothing where it can."""


def probe(data_file: str, storage_uri: str, marker: str, node: str) -> NodeReport:
    """Asks this node; ``marker`` is a file that another process has just written, ``data_file`` one of the data set."""
    problems = []
    try:
        storage.size(data_file)
        storage.read_range(data_file, 0, 4)
    except ArplusError as error:
        problems.append(f"--data: {error}")
    mine = f"{marker}-{node}"
    try:
        storage.write_bytes(mine, b"")
        storage.delete(mine)
        if not storage.exists(marker):
            problems.append(f"--storage {storage_uri}: is another folder here than where the job runs")
    except ArplusError as error:
        problems.append(f"--storage: {error}")
    shm = Path("/dev/shm")
    return NodeReport(
        versions=versions(),
        free_disk=shutil.disk_usage(tempfile.gettempdir()).free,
        free_shm=shutil.disk_usage(shm).free if shm.exists() else 0,
        bf16=has_bf16(),
        problems=problems,
    )


def has_bf16(cpuinfo: str | None = None) -> bool:
    """Whether a processor has instructions for products in bf16, by what Linux says of it (``/proc/cpuinfo``).

    True where it says nothing: nothing is known then that a user could be warned of.
    """
    if cpuinfo is None:
        try:
            cpuinfo = Path("/proc/cpuinfo").read_text(errors="replace")
        except OSError:
            return True
    listed = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    return not listed or any({"avx512_bf16", "amx_bf16", "bf16"} & set(flags) for flags in listed)


def versions() -> dict[str, str]:
    """:attr:`NodeReport.versions` of the node that asks."""
    return {"python": python_version(), **{name: version(name) for name in PACKAGES}, "arplus": _code()}


def check_versions(name: str, there: dict[str, str], here: dict[str, str]) -> None:
    """Raises :class:`ResourceError` where the node called ``name`` has other versions than this one."""
    different = [f"{k} {v} there, {here[k]} here" for k, v in there.items() if v != here[k]]
    if different:
        raise ResourceError(f"node {name}: other versions ({'; '.join(different)}); start all nodes from one image")


def code_tags() -> dict[str, str]:
    """Which code runs, as an MLflow run's tags: its version and hash, and its commit where it is a git checkout.

    A submitted job has the hash alone: neither ``.git`` nor git reach the nodes.
    """
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return {"code": _code()}
    return {"code": _code(), "mlflow.source.git.commit": commit}


def _code() -> str:
    """The version of this package, and a hash of its code: images of one version may hold different commits."""
    folder = Path(storage.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        digest.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:10]})"
