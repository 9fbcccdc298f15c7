"""The direction of imports, and what must not be in the repository."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
BASE = {"arplus", "arplus.claims", "arplus.cli", "arplus.config", "arplus.documents", "arplus.errors", "arplus.pages"}
BASE |= {"arplus.process", "arplus.proxies", "arplus.s3", "arplus.storage", "arplus.sums", "arplus.text"}
BASE |= {"arplus.torch_private"}
"""Modules that everything may import, and that import nothing above them."""


def _rooms(*names: str) -> set[str]:
    return BASE | {f"arplus.{name}" for name in names}


ALLOWED = {
    # The model reads like the paper, so its code may be lifted out with two small modules.
    "model": {"arplus.config", "arplus.errors", "arplus.model"},
    # They know the model, and it knows none of them.
    "kernels": {"arplus.kernels", "arplus.model", "arplus.torch_private"},
    "data": _rooms("data", "model", "cluster.connection"),
    "cluster": _rooms("cluster", "data"),
    "prepare": _rooms("prepare", "data", "cluster"),
    "synthetic": _rooms("synthetic", "data"),
    "runs": _rooms("runs", "data", "model", "pretrained"),
    "pretrained": _rooms("pretrained", "data", "model"),
    "tracking": _rooms("tracking"),
    "evaluation": _rooms("evaluation", "cluster", "runs", "data", "kernels", "model", "tracking"),
    "training": _rooms(
        "training", "cluster", "runs", "data", "evaluation", "kernels", "model", "pretrained", "tracking"
    ),
    "study": _rooms("study", "cluster", "runs", "data", "evaluation", "model", "tracking", "training"),
    # It measures all the others, and none of them knows it.
    "benchmark": _rooms(
        *("benchmark", "cluster", "runs", "data", "prepare", "synthetic", "evaluation", "kernels", "model"),
        *("tracking", "training"),
    ),
}
"""Package or module → what of ours it may import; modules that are not named here are part of the base."""
MODEL_NEEDS = {"numpy", "safetensors", "torch"}
ONLY_IN: dict[str, str | tuple[str, ...]] = {
    "huggingface_hub": "arplus/pretrained/",
    "transformers": ("arplus/pretrained/", "arplus/benchmark/baselines/bart.py"),
    "deepspeed": "arplus/training/",
    "gensim": "arplus/pretrained/word2vec.py",
    # Two, since one would be over 400 lines. The flavor's loader is neither: MLflow calls it, it never calls MLflow.
    "mlflow": ("arplus/tracking/client.py", "arplus/tracking/registry.py"),
    "optuna": "arplus/study/search.py",
}
"""Library → the places that may import it."""


def imported(path, module):
    """Names of the modules that a file imports anywhere, also inside functions; ``from a import b`` counts as a.b."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def within(name, allowed):
    return any(name == a or name.startswith(a + ".") for a in allowed if a != "arplus")


def violations(root):
    """Imports in the tree ``root`` that go against the direction."""
    for path in sorted((root / "arplus").rglob("*.py")):
        relative = path.relative_to(root)
        module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
        part = Path(relative.parts[1]).stem
        for name in imported(path, module):
            top = name.split(".")[0]
            if top in ONLY_IN and not relative.as_posix().startswith(ONLY_IN[top]):
                yield f"{relative} imports {name}: only {ONLY_IN[top]} may"
            if top == "jobs":
                yield f"{relative} imports {name}: a job is at the top"
            if top == "arplus" and not within(name, ALLOWED.get(part, BASE)) and not is_base(name, part):
                yield f"{relative} imports {name}"
            if part == "model" and top not in MODEL_NEEDS | {"arplus"} | set(sys.stdlib_module_names):
                yield f"{relative} imports {name}: the model needs torch alone"


def is_base(name, part):
    """Whether ``name`` is a plain name of the package itself, as in ``from arplus import __version__``."""
    return part != "model" and name == "arplus.__version__"


def test_imports_go_one_way():
    assert list(violations(ROOT)) == []


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("model/x.py", "from arplus import storage"),
        ("model/x.py", "from arplus.data.loader import RankLoader"),
        ("model/x.py", "from arplus import kernels"),
        ("kernels/x.py", "from arplus.data import collate"),
        ("model/x.py", "import pyarrow"),
        ("model/x.py", "from ..data import loader"),
        ("data/x.py", "from arplus.training import loop"),
        ("data/x.py", "def f():\n    import mlflow.entities"),
        ("evaluation/x.py", "import arplus.training.loop"),
        ("tracking/x.py", "from mlflow import MlflowClient"),
        ("tracking/x.py", "from arplus.model import batch"),
        ("training/x.py", "from jobs.train import main"),
        ("training/x.py", "from arplus.benchmark import machine"),
        ("training/x.py", "from arplus.study import record"),
        ("study/x.py", "import optuna"),
        ("training/x.py", "def f():\n    from transformers import AutoModel"),
        ("model/x.py", "from arplus.pretrained import weights"),
        ("text.py", "from arplus.data import records"),
        ("model/x.py", "import deepspeed"),
    ],
)
def test_an_import_against_the_direction_is_caught(tmp_path, file, line):
    path = tmp_path / "arplus" / file
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert list(violations(tmp_path))


@pytest.mark.parametrize("line", ["import torch", "from . import layers", "from arplus.errors import UsageError"])
def test_an_import_along_the_direction_is_not(tmp_path, line):
    path = tmp_path / "arplus" / "model" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert list(violations(tmp_path)) == []


@pytest.fixture(scope="module")
def files():
    """Everything that is, or would be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: nothing says which files belong to the repository")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_is_large(files):
    large = {str(f.relative_to(ROOT)): f.stat().st_size for f in files if f.stat().st_size > 2**20}
    assert large == {}


def test_no_path_of_a_machine(files):
    home = re.compile(r"(?<![\w.~])/(?:root|Users/\w+|home/(?!ray/)\w+)/|" + re.escape(f"{ROOT}/"))
    found = []
    for file in files:
        text = file.read_bytes().decode("utf-8", errors="ignore")
        found += [f"{file.relative_to(ROOT)}: {match}" for match in home.findall(text)]
    assert found == []


def test_constraints_are_plain_versions():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9A-Za-z.]*", pin) for pin in pins), (
        "a pin with a build or an address; torch's without +cpu serves CUDA, too"
    )


def test_every_dependency_is_constrained():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [name for names in (project["dependencies"], *extras) for name in names]
    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert [name for name in wanted if normal(re.match(r"[\w.-]+", name)[0]) not in pinned] == []


def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def test_nothing_from_storage_is_unpickled():
    """Checkpoints are plain files; what is pickled stays in Ray's memory; torch reads only weights."""
    lines = {f: f.read_text(encoding="utf-8").splitlines() for f in (ROOT / "arplus").rglob("*.py")}
    unpickles = re.compile(
        r"pickle\.loads?\(|Unpickler|(?<!safetensors\.)torch\.load\((?!.*weights_only=True)|allow_pickle|load_checkpoint\("
    )
    found = {str(f.relative_to(ROOT)) for f, texts in lines.items() for text in texts if unpickles.search(text)}
    assert found == {"arplus/data/windows.py", "arplus/evaluation/evaluate.py"}


def test_every_package_is_listed():
    import tomllib

    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {".".join(f.parent.relative_to(ROOT).parts) for f in (ROOT / "arplus").rglob("__init__.py")}
    assert set(listed) == there


def test_every_file_that_is_not_python_is_package_data(files):
    import tomllib

    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["arplus"]
    package = ROOT / "arplus"
    others = {f for f in files if f.is_relative_to(package) and f.suffix not in (".py", ".md")}
    assert others == {f for pattern in patterns for f in package.glob(pattern)}
    assert others
