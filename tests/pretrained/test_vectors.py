"""Character vectors are read as gensim and the paper's code write them, and become the character table's start."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.prepared import CHARACTERS, write_dataset
from helpers.small_models import smallest_run

from arplus.config import ModelConfig, TrainConfig, VectorsConfig, VocabularySizes, with_values
from arplus.data.dataset import Dataset
from arplus.errors import UsageError
from arplus.model.network import PersonaTransformer
from arplus.pretrained import vectors
from arplus.pretrained.word2vec import Utterances, make_vectors
from arplus.runs import checkpoint
from arplus.text import Vocabulary
from arplus.training.start import load

ODD = Vocabulary(["我", "\u3000", "1", '"', "好", "\u2028", "x"], [900, 50, 40, 30, 20, 10, 1])
"""Tokens at which a parser may stumble; the last one has no vector."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data"), {"train": [[300, 200], [100]], "valid": [[9]]})


def file_of(folder: Path, tokens: list[str], width: int, seed: int = 0) -> tuple[str, dict[str, np.ndarray]]:
    """A file of random vectors, in the form of the paper's code."""
    found = dict(zip(tokens, np.random.default_rng(seed).normal(0, 0.6, (len(tokens), width)), strict=True))
    lines = [f"{token} {' '.join(map(str, vector.tolist()))}" for token, vector in found.items()]
    path = folder / "vec-char.txt"
    path.write_text("\n".join([f"{len(tokens)} {width}", *lines, ""]), newline="\n")
    return str(path), found


def test_odd_tokens_are_read(tmp_path: Path) -> None:
    uri, there = file_of(tmp_path, [*reversed(ODD.tokens[:-1]), "</s>", "a b"], 3)
    found = vectors.read(uri, ODD)
    assert found.ids_N.tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_allclose(found.vectors_NE, [there[token] for token in ODD.tokens[:-1]], rtol=1e-6)
    assert found.coverage == pytest.approx(1050 / 1051)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "line 1: must be two numbers"),
        ("我 0.1 0.2\n", "line 1: must be two numbers"),
        ("2 2\n我 0.1 0.2\n", "line 1: says that 2 vectors follow, and 1 do; is the file whole"),
        ("2 2\n我 0.1 0.2\n好 0.1\n", "line 3: must hold a token and 2 finite numbers"),
        ("2 2\n我 0.1 0.2\n好 0.1 nan\n", "line 3: must hold a token and 2 finite numbers"),
        ("2 2\n我 0.1 0.2\n好 0.1 x\n", "line 3: could not convert"),
        ("2 2\n我 0.1 0.2\n我 0.1 0.3\n", "line 3: '我' is there twice"),
        ("1 2\n\udcff 0.1 0.2\n", "line 2: .*can't decode"),
        ("1 2\n好 0.1 0.2\n", "has vectors for 2% of the text's characters, less than 90%"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path: Path, text: str, problem: str) -> None:
    file = tmp_path / "vectors.txt"
    file.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UsageError, match=f"^--init.character-vectors {file}: {problem}"):
        vectors.read(str(file), ODD)


def test_rows_keep_their_direction_and_have_the_scale_of_a_start(tmp_path: Path) -> None:
    """At the paper's sizes an RMS of 0.01436; what has no vector stays as it was."""
    characters = Vocabulary([chr(0x4E00 + i) for i in range(9_489)], [9_489 - i for i in range(9_489)])
    config = ModelConfig(layers=1, repeats=1, d_model=16, heads=2, ff_size=16, ff_bottleneck=8, memory_hops=0)
    torch.manual_seed(0)
    model = PersonaTransformer(config, VocabularySizes(characters=9_498))
    before = {name: weight.clone() for name, weight in model.weights().items()}
    uri, there = file_of(tmp_path, characters.tokens[:9_000], 200)
    said = vectors.initialise(model, characters, uri)
    table = model.characters.weight.detach()
    known, theirs = table[:9_000], torch.tensor(np.stack(list(there.values())), dtype=torch.float32)
    assert float(known.square().mean().sqrt()) == pytest.approx(0.01436, rel=1e-2)
    assert float(torch.cosine_similarity(known, theirs).min()) == pytest.approx(1.0, abs=1e-6)
    factors = (known / theirs).flatten()
    assert float(factors.std() / factors.mean()) < 1e-5, "one factor for all"
    assert torch.equal(table[9_000:], before.pop("characters.weight")[9_000:])
    assert all(torch.equal(model.weights()[name], weight) for name, weight in before.items())
    assert "9,000 of 9,489 characters, 99.7% of the text" in said


def test_a_run_starts_from_them_and_one_that_goes_on_does_not(dataset: Dataset, tmp_path: Path) -> None:
    run = with_values(smallest_run("ar"), {"data": dataset.uri, "run_name": "r"}, source="test")
    _, plain, _ = load(run, None)
    uri, _ = file_of(tmp_path, CHARACTERS.tokens, run.model.embedding_size)
    chosen = with_values(run, {"init.character_vectors": uri}, source="test")
    _, model, _ = load(chosen, None)
    changed = [n for n, w in model.weights().items() if not torch.equal(w, plain.weights()[n])]
    assert changed == ["characters.weight"]
    assert model.head.weight is model.characters.weight, "AR's head is the same table"
    state = checkpoint.TrainState(
        config=chosen,
        progress=checkpoint.TrainProgress(fingerprint="test", step=1),
        schedule={},
        rules=dataset.rules,
        characters=dataset.characters,
        persona_words=dataset.persona_words,
        weights=plain.weights(),
        moments={},
    )
    start = checkpoint.save(str(tmp_path / "run"), state)
    Path(uri).unlink()
    _, model, _ = load(chosen, start)
    assert torch.equal(model.characters.weight, plain.characters.weight)


def test_a_width_that_does_not_fit_and_two_sources_are_refused(tmp_path: Path) -> None:
    model = PersonaTransformer(smallest_run().model, VocabularySizes(characters=49))
    uri, _ = file_of(tmp_path, CHARACTERS.tokens, 5)
    with pytest.raises(
        UsageError, match=r"vectors of 5 components .* need 16; make them with jobs/vectors.py --size 16"
    ):
        vectors.initialise(model, CHARACTERS, uri)
    with pytest.raises(UsageError, match=r"--init\.character-vectors: contradicts --init-from"):
        with_values(TrainConfig(), {"init.character_vectors": "v", "init_from": "c"}, source="test")


def test_the_text_is_each_examples_last_utterance_and_its_response(dataset: Dataset) -> None:
    text = Utterances(dataset)
    found = list(text)
    assert found == list(text), "an epoch reads it again"
    rows = text.windows.read(0, 0, ["context", "response"]).to_pylist()
    assert len(found) == 2 * len(rows) == 1200
    sep = CHARACTERS.special.sep
    for row, last, response in zip(rows, found[::2], found[1::2], strict=True):
        utterances = "".join(CHARACTERS.token(i) for i in row["context"]).split("[SEP]")
        assert ("".join(last), "".join(response)) == (utterances[-2], CHARACTERS.decode(row["response"]))
        assert row["context"][-1] == sep


def test_vectors_are_made_again_to_the_byte_and_gensim_reads_them(dataset: Dataset, tmp_path: Path) -> None:
    keyed = pytest.importorskip("gensim.models", reason="pip install -e '.[vectors]'").KeyedVectors
    config = VectorsConfig(data=dataset.uri, output=str(tmp_path / "a.txt"), size=16, epochs=2)
    assert "40 of 40 characters" in make_vectors(config)
    make_vectors(replace(config, output=str(tmp_path / "b.txt")))
    assert (tmp_path / "a.txt").read_bytes() == (tmp_path / "b.txt").read_bytes()
    theirs = keyed.load_word2vec_format(str(tmp_path / "a.txt"))
    ours = vectors.read(config.output, CHARACTERS)
    np.testing.assert_array_equal([theirs[token] for token in CHARACTERS.tokens], ours.vectors_NE)
    theirs.save_word2vec_format(str(tmp_path / "c.txt"))
    np.testing.assert_allclose(vectors.read(str(tmp_path / "c.txt"), CHARACTERS).vectors_NE, ours.vectors_NE, rtol=1e-6)
    assert not math.isclose(float(ours.vectors_NE.std()), 0.0)
