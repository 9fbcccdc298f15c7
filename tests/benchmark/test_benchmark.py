"""The benchmarks measure what they say, on data of seconds; without the extras they say so and go on."""

import json
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from helpers.commands import run_all
from helpers.prepared import random_examples, write_dataset

from arplus.benchmark import feed_speed, figures, prepare_speed, usage
from arplus.benchmark.baselines import list_batches, repeated_lines
from arplus.benchmark.baselines.list_batches import Collate
from arplus.benchmark.options import DataBenchmark, Output, PrepareBenchmark
from arplus.config import AR, ModelConfig, SynthesizeConfig, special_ids
from arplus.data.collate import BatchSpec, ExampleRng, Window
from arplus.data.dataset import Dataset
from arplus.data.packing import unpack
from arplus.data.sampler import EpochSampler
from arplus.data.windows import WindowMaker
from arplus.model.batch import Packed
from arplus.synthetic.write import synthesize

EXAMPLES = 300


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("dataset"), {"train": [[90, 110], [64, 36]], "valid": [[13]]})


@pytest.fixture
def sampler(dataset: Dataset) -> EpochSampler:
    return EpochSampler(split=dataset.split("train"), batch_size=8, window_batches=10, seed=0, shuffled=True)


@pytest.fixture
def without_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # an import of it fails, installed or not


# -------------------------------------------------------------------------------------------------------------- data


@pytest.mark.parametrize("model", [ModelConfig(), AR], ids=["words", "characters"])
def test_the_other_side_collates_the_same_batch(dataset: Dataset, model: ModelConfig) -> None:
    spec = BatchSpec.of(model, dataset.sizes)
    table = random_examples(range(20)).select(spec.columns)
    rows = np.array([3, 19, 7, 0, 11])
    ours = Window(table, spec).batch(rows, ExampleRng(0, 0))
    theirs = Collate(spec)([table.slice(i, 1).to_pylist()[0] for i in rows])
    ids, persona_ids = special_ids(dataset.sizes.characters), special_ids(dataset.sizes.persona_words)
    persona_pad = (persona_ids if spec.persona_words else ids).pad

    def real(name: str, pad: int) -> list[list[int]]:
        return [[i for i in row if i != pad] for row in theirs[name].flatten(0, -2).tolist()]

    def lists(packed: Packed) -> list[list[int]]:
        return [part.tolist() for part in packed.ids.split(packed.sequences.lengths.tolist())]

    assert theirs["example_id_B"].tolist() == ours.example_id_B.tolist()
    assert real("context_BS", ids.pad) == lists(ours.context)
    assert real("profiles_BPW", persona_pad) == lists(ours.profiles)
    assert real("target_persona_BK", persona_pad) == lists(ours.persona)
    assert [row[:-1] for row in real("response_BT", ids.pad)] == lists(ours.response)
    whose = [row[: len(c)] for row, c in zip(theirs["context_profile_BS"].tolist(), lists(ours.context), strict=True)]
    profiles = theirs["profiles_BPW"].shape[1]
    assert [i * profiles + p for i, row in enumerate(whose) for p in row] == ours.speaker_N.tolist()
    if ours.infilled is not None:
        infilled = real("infilled_BU", ids.pad)
        masks = [row.count(ids.mask) for row in lists(ours.infilled)]
        assert [row.count(ids.mask) for row in infilled] == masks


def test_the_other_side_gets_the_feeds_batches(dataset: Dataset, sampler: EpochSampler) -> None:
    spec = BatchSpec.of(ModelConfig(), dataset.sizes)
    tables, batches = list_batches.first_batches(sampler, spec, 13)
    ids = np.concatenate([table["example_id"].to_numpy() for table in tables])
    maker = WindowMaker(sampler=sampler, spec=spec)
    ours = [batch for window in range(2) for batch in unpack(maker.make(0, window)[0][0].micro_batches)]
    assert [ids[rows].tolist() for rows in batches] == [batch.example_id_B.tolist() for batch in ours[:13]]


def test_bytes_read_are_those_of_the_columns(dataset: Dataset, sampler: EpochSampler) -> None:
    words, characters = (BatchSpec.of(model, dataset.sizes) for model in (ModelConfig(), AR))
    whole = sum(path.stat().st_size for path in Path(dataset.uri, "train").iterdir())
    windows_in_two_groups = sum(len(sampler.pieces(0, window)) for window in range(sampler.windows)) / 4
    assert 0.2 * whole < feed_speed.bytes_read(sampler, words, sampler.steps) < windows_in_two_groups * whole
    assert feed_speed.bytes_read(sampler, words, sampler.steps) != feed_speed.bytes_read(
        sampler, characters, sampler.steps
    )
    assert feed_speed.bytes_read(sampler, words, 10) < feed_speed.bytes_read(sampler, words, sampler.steps)


@pytest.mark.usefixtures("ray_cluster", "without_datasets")
def test_data_without_the_extras(dataset: Dataset) -> None:
    settings = DataBenchmark(data=dataset.uri, batch_size=8, shuffle_window_batches=10, passes=2)
    result = feed_speed.measure(settings)
    found = result.figures
    assert found["ratio_datasets"] is None
    assert ("datasets + DataLoader", figures.NOT_INSTALLED) in result.table
    assert 0 < found["examples_per_second_per_core"] < found["examples_per_second"]
    assert found["examples_per_second_per_core"] == pytest.approx(found["examples_per_second"] / 2)
    assert found["peak_memory_bytes"] > psutil.Process().memory_info().rss / 2


def test_data_with_the_extras(dataset: Dataset, sampler: EpochSampler) -> None:
    pytest.importorskip("datasets", reason="the comparison needs make benchmark-deps")
    found = list_batches.examples_per_second(sampler, BatchSpec.of(ModelConfig(), dataset.sizes), 6)
    assert isinstance(found, float)
    assert found > 0


# ----------------------------------------------------------------------------------------------------------- prepare


def in_python(files: list[str]) -> tuple[int, int]:
    lines = [line for file in files for line in Path(file).read_bytes().splitlines()]
    return len(lines), len(set(lines))


def not_there(files: list[str]) -> tuple[int, int]:
    raise ImportError(files)


def breaks(files: list[str]) -> tuple[int, int]:
    raise ValueError("cannot read this\nat all")


@pytest.mark.soak
@pytest.mark.usefixtures("generator", "ray_cluster")
def test_prepare_beside_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeated_lines, "OTHERS", {"python": in_python, "missing": not_there})
    raw = tmp_path / "raw.jsonl"
    made = synthesize(SynthesizeConfig(output=str(raw), records=400, duplicates=20))
    result = prepare_speed.measure(PrepareBenchmark(input=str(raw)))
    found, table = result.figures, dict(result.table)
    assert found["sessions_per_second"] == pytest.approx(found["records_per_second"] * 380 / 400)
    assert table["sessions"] == "380"
    assert found["peak_memory_bytes"] > 2**27
    assert f"{made.exact_duplicates} repeated lines" in table["python, repeated lines alone"]
    assert found["python_lines_per_second"] > 0
    assert found["missing_lines_per_second"] is None
    assert table["missing, repeated lines alone"] == figures.NOT_INSTALLED


@pytest.mark.processes
def test_what_another_program_cannot_do_is_a_line_of_the_table(tmp_path: Path) -> None:
    (tmp_path / "raw.jsonl").write_text("x\n")
    assert repeated_lines.drop(breaks, str(tmp_path)) == "failed: cannot read this"
    assert "local files" in str(repeated_lines.drop(in_python, "s3://bucket/raw"))


@pytest.mark.usefixtures("generator")
@pytest.mark.parametrize("name", list(repeated_lines.OTHERS))
def test_others_count_lines(tmp_path: Path, name: str) -> None:
    pytest.importorskip(name, reason="the comparison needs make benchmark-deps")
    files = []
    for i in range(2):
        files.append(str(tmp_path / f"{i}.jsonl"))
        synthesize(SynthesizeConfig(output=files[-1], records=200, duplicates=30, seed=1))
    assert repeated_lines.OTHERS[name](files) == in_python(files) == (400, 185)


# ----------------------------------------------------------------------------------------------- machine and report


def test_the_machine_is_described() -> None:
    described = usage.describe()
    assert described["matmul_gflops"] > 0.1
    assert {"cores", "torch", "ray", "gpu", "load", "processor"} <= described.keys()
    json.dumps(described)


def test_usage_counts_a_childs_memory_and_time() -> None:
    work = "x = bytearray(b'1') * (300 << 20)\nfor i in range(10**7): pass\nprint(flush=True)\ninput()"
    with usage.Usage(memory=True) as used:
        child = subprocess.Popen([sys.executable, "-c", work], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert child.stdout is not None
        child.stdout.readline()
    child.communicate(b"\n")
    assert used.peak_memory_bytes > 300 << 20
    assert used.cpu_seconds > 0.1
    assert used.seconds > 0.1


@pytest.mark.processes
def test_figures_go_to_json_and_mlflow(tmp_path: Path) -> None:
    result = figures.Result(figures={"speed": 2.0, "ratio": None}, table=[("speed", "2")])
    described = {"cores": 2, "matmul_gflops": 50.0}
    settings = Output(json=str(tmp_path / "out.json"), mlflow=f"sqlite:///{tmp_path}/mlflow.db")
    figures.write("data", settings, described, result)
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "machine": described,
        "data": {"speed": 2.0, "ratio": None},
    }
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        metrics = dict(database.execute("SELECT key, value FROM metrics").fetchall())
        status = database.execute("SELECT status FROM runs").fetchall()
    assert metrics == {"data/speed": 2.0, "machine/matmul_gflops": 50.0}
    assert status == [("FINISHED",)]
    assert figures.text(described, result).splitlines()[-1].split() == ["speed", "2"]


MISTAKES = {
    "jobs/benchmark.py": "a subject is required",
    "jobs/benchmark.py speed": "'speed'",
    "jobs/benchmark.py data": "--data: is required",
    "jobs/benchmark.py data --sped": "sped",
}


def test_mistakes_are_explained(tmp_path: Path) -> None:
    for message, (code, said) in zip(MISTAKES.values(), run_all(list(MISTAKES), tmp_path), strict=True):
        assert code == 2
        assert message in said
