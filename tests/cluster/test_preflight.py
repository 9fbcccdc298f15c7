"""What cannot run is refused before a worker starts, in one line that says what to change."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.prepared import write_dataset

from arplus.cluster import connection, node, nodes, preflight
from arplus.config import TrainConfig
from arplus.data.dataset import Dataset
from arplus.errors import ArplusError

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[8]], "valid": [[4]]})


@pytest.fixture
def config(dataset: Dataset, tmp_path: Path) -> TrainConfig:
    return TrainConfig(data=dataset.uri, storage=str(tmp_path / "runs"))


def refusal(config: TrainConfig, dataset: Dataset, stored_bytes: int = 0) -> tuple[int, str]:
    """The exit code and the one line."""
    with pytest.raises(ArplusError) as caught:
        preflight.check_nodes(config, dataset, stored_bytes)
    assert "\n" not in str(caught.value)
    return caught.value.exit_code, str(caught.value)


def test_all_is_well_and_nothing_is_left_behind(
    config: TrainConfig, dataset: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    preflight.check_nodes(config, dataset, 1000)
    assert list(Path(config.storage).iterdir()) == []
    assert caplog.messages == []


def test_data_that_a_node_cannot_read(config: TrainConfig, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "data", {"train": [[8]], "valid": [[4]]})
    file = Path(other.split("train").row_groups[0].file)
    file.unlink()
    code, said = refusal(config, other)
    assert code == 2
    assert said.startswith("node ")
    assert f"--data: {file}: no such file" in said


def test_storage_that_cannot_be_written(config: TrainConfig, dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, said = refusal(replace(config, storage=str(tmp_path / "file" / "runs")), dataset)
    assert code == 2
    assert said.startswith(f"{tmp_path}/file/runs/.preflight-")


def test_a_compiled_step_without_a_gpu(config: TrainConfig, dataset: Dataset) -> None:
    code, said = refusal(replace(config, compile="on"), dataset)
    assert code == 3
    assert said.startswith("--compile on: the cluster has no GPU alive")


def test_storage_that_is_another_folder_on_a_node(dataset: Dataset, tmp_path: Path) -> None:
    """A node that does not see what the driver wrote has a disk of its own."""
    facts = node.probe(dataset.split("train").row_groups[0].file, str(tmp_path), str(tmp_path / "not-there"), "n")
    assert facts.problems == [f"--storage {tmp_path}: is another folder here than where the job runs"]


def test_other_versions(config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = node.versions()
    assert theirs.keys() == {"python", "ray", "torch", "deepspeed", "arplus"}
    monkeypatch.setattr(node, "versions", lambda: theirs | {"torch": "1.0"})
    code, said = refusal(config, dataset)
    assert code == 3
    assert f"other versions (torch {theirs['torch']} there, 1.0 here)" in said


def test_the_code_has_a_version_where_there_is_no_git(monkeypatch: pytest.MonkeyPatch) -> None:
    here = node.code_tags()
    assert here["code"] == node.versions()["arplus"]
    assert len(here["mlflow.source.git.commit"]) == 40, "the tests run in a checkout"
    monkeypatch.setenv("PATH", "")
    assert node.code_tags() == {"code": here["code"]}


@pytest.mark.parametrize(
    ("limit", "says"), [("MIN_SHM", "free in /dev/shm, and training needs"), ("MIN_DISK", "free for temporary files")]
)
def test_space_that_a_node_lacks(
    config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch, limit: str, says: str
) -> None:
    monkeypatch.setattr(preflight, limit, 1 << 60)
    code, said = refusal(config, dataset)
    assert (code, says in said) == (3, True), said


def test_storage_without_room_for_the_checkpoints(config: TrainConfig, dataset: Dataset) -> None:
    code, said = refusal(config, dataset, stored_bytes=1 << 50)
    assert code == 3
    assert f"--storage {config.storage}: " in said
    assert "the checkpoints that are there at one time take 1048576.0 GiB; free" in said


def test_a_node_that_does_not_answer(config: TrainConfig, dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "ANSWER_S", 0.0)
    monkeypatch.setattr(nodes, "LONGEST_S", 0.0)
    code, said = refusal(config, dataset)
    assert (code, "no answer within 0 s" in said) == (3, True), said


# --------------------------------------------------------------------------------------------------------------- bf16


@pytest.mark.parametrize(
    ("cpuinfo", "found"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx avx2 fma\n\nprocessor\t: 1\nflags\t\t: fpu avx avx2 fma\n", False),
        ("flags\t\t: avx2 avx512f avx512_vnni\nvmx flags\t: bf16\n", False),
        ("flags\t\t: avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: avx2 amx_bf16 amx_tile\n", True),
        ("Features\t: fp asimd sve\n", False),
        ("Features\t: fp asimd sve svebf16 i8mm bf16\n", True),
        ("processor\t: 0\nmodel name\t: something else\n", True),
    ],
)
def test_bf16_is_known_by_the_processors_flags(cpuinfo: str, found: bool) -> None:
    assert node.has_bf16(cpuinfo) == found


@pytest.mark.parametrize(
    ("precision", "gpus", "has", "warned"),
    [("bf16", 0, False, 1), ("bf16", 0, True, 0), ("bf16", 1, False, 0), ("auto", 0, False, 0), ("fp32", 0, False, 0)],
)
def test_bf16_that_a_processor_lacks_is_said_once(
    config: TrainConfig,
    dataset: Dataset,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    precision: Any,
    gpus: int,
    has: bool,
    warned: int,
) -> None:
    ask = nodes.ask
    monkeypatch.setattr(nodes, "ask", lambda *a: {n: f._replace(bf16=has) for n, f in ask(*a).items()})
    monkeypatch.setattr(connection, "offer", lambda *_: connection.Offer(4, gpus))
    preflight.check_nodes(replace(config, precision=precision, workers=2), dataset, 0)
    assert [("takes several times as long" in m, "--precision fp32" in m) for m in caplog.messages] == [
        (True, True)
    ] * warned
