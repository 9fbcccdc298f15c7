"""Pretrained weights compute in our layers what they computed in their own, and what does not fit is refused."""

import dataclasses
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.prepared import CHARACTERS, PERSONA_WORDS, random_state, write_dataset
from helpers.pretrained import TOKENS, make_pretrained
from torch import Tensor

from arplus import cli, storage
from arplus.config import InitConfig, ModelConfig, TrainConfig, preset
from arplus.errors import UsageError
from arplus.model.batch import Sequences
from arplus.model.network import PersonaTransformer
from arplus.pretrained import models, start
from arplus.pretrained.weights import choose, initialise
from arplus.runs import checkpoint
from arplus.runs.folder import RunFolder
from arplus.text import Vocabulary, sizes
from arplus.training.estimate import report
from arplus.training.start import load, resolve

pytestmark = pytest.mark.usefixtures("one_thread")


def fitting(preset_name: str, **changes: Any) -> ModelConfig:
    """A preset's model in the sizes of the small pretrained ones, with three unique layers."""
    shape: dict[str, Any] = {"layers": 3, "repeats": 1, "d_model": 32, "embedding_size": 24, "heads": 4, "ff_size": 48}
    shape |= {"ff_bottleneck": None, "dropout": 0.0}
    return dataclasses.replace(preset(preset_name).model, **shape | changes)


def fresh(config: ModelConfig) -> PersonaTransformer:
    torch.manual_seed(0)
    return PersonaTransformer(config, sizes(CHARACTERS, PERSONA_WORDS)).eval()


def started(config: ModelConfig, folder: Path | str, **init: Any) -> PersonaTransformer:
    model = fresh(config)
    initialise(model, CHARACTERS, InitConfig(pretrained=str(folder), **init))
    return model


@torch.no_grad()
@pytest.mark.parametrize("activation", ["gelu", "relu"])
def test_our_encoder_computes_what_theirs_does(tmp_path: Path, activation: str) -> None:
    """But for the epsilon of the norms, and only with their activation."""
    theirs = make_pretrained(tmp_path, "Bert")
    model = started(fitting("no-rezero", embedding_size=32, activation=activation), tmp_path)
    ids = torch.randint(len(TOKENS), (2, 7))
    of = Sequences.of(torch.tensor([7, 7]))
    embeddings = theirs.embeddings
    x = embeddings.word_embeddings(ids) + embeddings.position_embeddings.weight[:7]
    x_ND = (x + embeddings.token_type_embeddings.weight[0]).flatten(0, 1)
    for layer in model.layers:
        x_ND = layer.encode(x_ND, of)
    error = (theirs.encoder.layer[2].output.LayerNorm(x_ND) - theirs(ids).last_hidden_state.flatten(0, 1)).abs().max()
    assert error <= 2e-4 if activation == "gelu" else error > 0.1


def expected(kind: str, theirs: dict[str, Tensor], k: int, projected: bool) -> dict[str, Tensor]:
    """What a unique layer that is set to their layer k holds, written out."""
    found = {}
    for part in ("weight", "bias"):
        if kind == "Albert":
            of = "encoder.albert_layer_groups.0.albert_layers.0"
            attention, output, norm1 = f"{of}.attention", f"{of}.attention.dense", f"{of}.attention.LayerNorm"
            expand, contract, first = f"{of}.ffn", f"{of}.ffn_output", f"{of}.full_layer_layer_norm"
        else:
            of = f"encoder.layer.{k}"
            attention, output = f"{of}.attention.self", f"{of}.attention.output.dense"
            norm1, expand, contract = (
                f"{of}.attention.output.LayerNorm",
                f"{of}.intermediate.dense",
                f"{of}.output.dense",
            )
            first = f"encoder.layer.{k - 1}.output.LayerNorm" if k else "embeddings.LayerNorm"
        stacked = [theirs[f"{attention}.{name}.{part}"] for name in ("query", "key", "value")]
        found[f"attention.query_key_value.{part}"] = torch.cat(stacked)
        names = {"attention.output": output, "feed_forward.expand": expand, "feed_forward.contract": contract}
        names |= {"norm1": norm1}
        if k or kind == "Albert" or not projected:
            names |= {"norm2": first, "pre_norm": first}
        found |= {f"{ours}.{part}": theirs[f"{name}.{part}"] for ours, name in names.items()}
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("row", ["arplus", "no-rezero", "ar"])
@pytest.mark.parametrize("kind", ["Bert", "Electra", "Albert"])
def test_each_tensor_is_its_source_and_the_others_start_as_ever(
    tmp_path: Path, kind: str, row: str, shared: bool
) -> None:
    theirs = make_pretrained(tmp_path, kind).state_dict()
    E = 32 if kind == "Bert" or row == "ar" else 24
    if kind != "Bert" and E == 32:
        theirs = make_pretrained(tmp_path, kind, embedding_size=32).state_dict()
    config = fitting(row, embedding_size=E, shared_stacks=shared)
    model, before = started(config, tmp_path), fresh(config).weights()
    wanted = {}
    for stack in ("layers",) if shared else ("layers", "encoder_layers"):
        for i in range(3):
            wanted |= {f"{stack}.{i}.{n}": v for n, v in expected(kind, theirs, i, kind != "Bert" and E < 32).items()}
    projection = {"Electra": "embeddings_project", "Albert": "encoder.embedding_hidden_mapping_in"}.get(kind)
    for name in ("context_input", "auxiliary_input", "persona_input", "response_input"):
        if projection and E < 32:
            wanted |= {f"{name}.projection.{part}": theirs[f"{projection}.{part}"] for part in ("weight", "bias")}
    for name, value in model.weights().items():
        if name != "characters.weight":
            assert value.equal(wanted.get(name, before[name])), name
    table, words = model.characters.weight, theirs["embeddings.word_embeddings.weight"]
    specials = {"[PAD]": 0, "[BOS]": 2, "[EOS]": 3, "[UNK]": 1, "[SEP]": 3, "[MASK]": 4}
    for i in range(CHARACTERS.size):
        token = CHARACTERS.token(i)
        k = specials.get(token, TOKENS.index(token) if token in TOKENS and i < len(CHARACTERS.tokens) else None)
        assert table[i].equal(before["characters.weight"][i] if k is None else words[k]), token


@torch.no_grad()
def test_parts_are_taken_apart(tmp_path: Path) -> None:
    theirs = make_pretrained(tmp_path, "Electra").state_dict()
    config = fitting("arplus", shared_stacks=False)
    before = fresh(config).weights()
    for part, taken in (
        ("encoder", "encoder_layers."),
        ("decoder", "layers."),
        ("embeddings", "characters."),
        ("projections", ("context_input.", "response_input.", "auxiliary_input.")),
    ):
        changed = {n for n, v in started(config, tmp_path, parts=part).weights().items() if not v.equal(before[n])}
        assert changed
        assert all(name.startswith(taken) for name in changed), part
    model = started(dataclasses.replace(config, repeats=3), tmp_path)
    last = theirs["encoder.layer.2.output.dense.weight"]
    assert model.layers[0].feed_forward.contract.weight.equal(last)


@pytest.mark.soak
def test_a_model_on_s3_is_copied_once_until_it_changes(
    tmp_path: Path, s3_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    read, reads = storage.read_bytes, []

    def noted(uri: str) -> bytes:
        reads.append(uri)
        return read(uri)

    monkeypatch.setattr(storage, "read_bytes", noted)
    uri = s3_server.uri("electra")

    def put(seed: int) -> str:
        make_pretrained(tmp_path / "electra", "Electra", seed=seed)
        for file in (tmp_path / "electra").iterdir():
            storage.write_bytes(f"{uri}/{file.name}", file.read_bytes())
        return start.resolve(InitConfig(pretrained=str(tmp_path / "electra"))).digest

    for seed in (1, 2):
        digest = put(seed)
        init = start.resolve(InitConfig(pretrained=uri))
        assert init.digest == digest
        assert sorted(reads) == [f"{uri}/{name}" for name in ("config.json", "model.safetensors", "vocab.txt")]
        model = fresh(fitting("arplus"))
        initialise(model, CHARACTERS, init)
        assert len(reads) == 3
        here = started(fitting("arplus"), tmp_path / "electra").weights()
        assert all(value.equal(here[name]) for name, value in model.weights().items())
        reads.clear()
        time.sleep(1.1)  # S3 tells the second in which a file was written
    assert "is not a model's folder" in refusal(fitting("arplus"), s3_server.uri("nothing"))


def test_which_layers_are_taken() -> None:
    assert choose(1, 12, "last", repeated=False) == choose(1, 12, "spread", repeated=False) == [11]
    assert choose(3, 12, "last", repeated=False) == [9, 10, 11]
    assert choose(3, 12, "spread", repeated=False) == [3, 7, 11]
    assert choose(5, 12, "spread", repeated=False) == [1, 3, 6, 8, 11]
    assert choose(3, 2, "last", repeated=True) == [0, 1, 0]
    assert choose(3, 2, "last", repeated=False) is None


def test_upper_case_is_known_by_its_lower_case_and_the_report_counts(tmp_path: Path) -> None:
    theirs = make_pretrained(tmp_path, "Bert")
    characters = Vocabulary([*CHARACTERS.tokens, "B"], [*[3] * 40, 30])
    model = PersonaTransformer(fitting("no-rezero", embedding_size=32), sizes(characters, PERSONA_WORDS))
    said = initialise(model, characters, InitConfig(pretrained=str(tmp_path), layers="spread"))
    assert model.characters.weight[40].equal(theirs.embeddings.word_embeddings.weight[TOKENS.index("b")])
    assert "46 of 50 characters, 98.0% of the text" in said
    assert "layers 0, 1, 2 of 3" in said
    assert "its activation is gelu, the network's relu" in said


# ------------------------------------------------------------------------------------------------------------- errors


def refusal(config: ModelConfig, path: Path | str, **init: Any) -> str:
    with pytest.raises(UsageError) as caught:
        started(config, path, **init)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("kind", ["Bert", "Electra", "Albert"])
def test_the_flags_of_the_refusal_make_it_fit(tmp_path: Path, kind: str) -> None:
    make_pretrained(tmp_path, kind)
    message = refusal(preset("arplus").model, tmp_path)
    flags = shlex.split(message.partition("; add ")[2])
    config = cli.train_command(["arplus", *flags], prog="train").config.model
    assert (config.activation, config.gate_start) == ("gelu-tanh" if kind == "Albert" else "gelu", 1)
    started(config, tmp_path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    config = fitting("arplus")
    assert "is not a model's folder: it needs config.json" in refusal(config, tmp_path / "missing")
    make_pretrained(tmp_path / "xlnet", "Bert")
    (tmp_path / "xlnet" / "config.json").unlink()
    assert "is not a model's folder: it needs config.json" in refusal(config, tmp_path / "xlnet")
    make_pretrained(tmp_path / "broken", "Bert")
    (tmp_path / "broken" / "model.safetensors").write_bytes(b"no weights at all")
    assert "cannot be read as a model" in refusal(config, tmp_path / "broken")


def test_an_xlnet_and_other_kinds_are_refused_with_the_reason(tmp_path: Path) -> None:
    xlnet = {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "vocab_size": len(TOKENS)}
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "embedding_size"):
        xlnet[name] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}.get(name, 48)
    make_pretrained(tmp_path / "xlnet", "XLNet", **xlnet)
    assert "is an XLNet, whose attention is relative" in refusal(fitting("arplus"), tmp_path / "xlnet")
    make_pretrained(tmp_path / "distil", "DistilBert", dim=32, hidden_dim=48, n_layers=2, n_heads=4)
    assert "is of kind 'distilbert'" in refusal(fitting("arplus"), tmp_path / "distil")


def test_more_unique_layers_than_it_has_are_refused(tmp_path: Path) -> None:
    make_pretrained(tmp_path, "Electra")
    assert "has 3 layers, and the network has 4 unique ones" in refusal(fitting("arplus", layers=4), tmp_path)


def test_a_vocabulary_of_something_else_is_refused(tmp_path: Path) -> None:
    make_pretrained(tmp_path, "Electra")
    (tmp_path / "vocab.txt").write_text("\n".join(["[PAD]", *map(str, range(40))]))
    assert "knows 0% of the text's characters, less than 90%" in refusal(fitting("arplus"), tmp_path)
    started(fitting("arplus"), tmp_path, parts="encoder,decoder,projections")


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    make_pretrained(tmp_path, "Electra", num_hidden_layers=2)
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    assert "its weights lack 16 of its tensors, encoder.layer.2." in refusal(fitting("arplus"), tmp_path)


def test_without_transformers_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_pretrained(tmp_path, "Electra")
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install -e '.[pretrained]'" in refusal(fitting("arplus"), tmp_path)


def test_a_hub_that_does_not_answer_is_told_in_time(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    hub = pytest.importorskip("huggingface_hub", reason="the extra 'pretrained' is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub.HfApi, "model_info", lambda *_, **__: time.sleep(60))
    assert models.HUB_SECONDS <= 8, "of 15 s, imports take the rest"
    monkeypatch.setattr(models, "HUB_SECONDS", 0.5)
    assert "the model hub does not give it (no answer within 0.5 s)" in refusal(fitting("arplus"), "nobody/nothing")


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--init.parts", "encoder,head"], r"--init.parts: must be some of embeddings, .* \(got 'encoder,head'\)"),
        (["--init.parts", "encoder"], "--init.parts: must name encoder and decoder or neither"),
        (["--init.pretrained", "x", "--init-from", "y"], "--init-from: contradicts --init.pretrained"),
    ],
)
def test_settings_that_contradict_are_refused(flags: list[str], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        cli.train_command(["arplus", *flags], prog="train")
    cli.train_command(["arplus", "--init.parts", "encoder", "--model.shared-stacks", "False"], prog="train")


# --------------------------------------------------------------------------------------------------------------- runs


@pytest.fixture
def run(tmp_path: Path) -> TrainConfig:
    """A run that starts from a pretrained model, as a job resolves it."""
    data = write_dataset(tmp_path / "data", {"train": [[40]], "valid": [[5]]})
    make_pretrained(tmp_path / "electra", "Electra")
    return resolve(
        TrainConfig(
            model=fitting("arplus", gate_start=1.0, activation="gelu"),
            data=data.uri,
            storage=str(tmp_path / "runs"),
            run_name="first",
            init=InitConfig(pretrained=str(tmp_path / "electra")),
        )
    )


def test_every_worker_starts_from_the_same_weights(run: TrainConfig) -> None:
    first, second = load(run, None)[1].weights(), load(run, None)[1].weights()
    assert all(value.equal(second[name]) for name, value in first.items())
    random = load(dataclasses.replace(run, init=InitConfig()), None)[1].weights()
    assert not first["characters.weight"].equal(random["characters.weight"])
    assert first["head.weight"].equal(random["head.weight"])
    assert "parameters are its, the others start as ever; layers 0, 1, 2 of 3; 45 of 49 characters" in report(run)


def test_a_run_that_goes_on_does_not_start_again(run: TrainConfig, tmp_path: Path) -> None:
    trained = fresh(run.model).weights()
    state = dataclasses.replace(random_state(), config=run, weights=trained)
    there = checkpoint.save(f"{run.storage}/{run.run_name}", state)
    shutil.rmtree(tmp_path / "electra")
    weights = load(run, there)[1].weights()
    assert all(value.equal(trained[name]) for name, value in weights.items())


def test_other_weights_under_the_same_path_are_refused_and_a_run_that_goes_on_needs_none(
    run: TrainConfig, tmp_path: Path
) -> None:
    RunFolder(f"{run.storage}/{run.run_name}").config.write(run)
    make_pretrained(tmp_path / "electra", "Electra", initializer_range=0.03)
    again = dataclasses.replace(run, init=InitConfig(pretrained=f"{tmp_path}/electra"))
    assert resolve(again) == run
    assert start.resolve(again.init).digest != run.init.digest
    with pytest.raises(UsageError, match=r"its weights are not those of before .* or take another --run-name"):
        load(run, None)
