"""Presets have the paper's values, and the table of GPUs its cards."""

from dataclasses import asdict
from typing import Any

import pytest

from arplus import config as config_module
from arplus.config import (
    PAPER_ROWS,
    PRESETS,
    ChatConfig,
    ExampleRules,
    PrepareConfig,
    Sampling,
    VocabularySizes,
    preset,
    special_ids,
    tiny,
    validate,
)
from arplus.config.gpus import peak_flops
from arplus.errors import UsageError

ROWS = ["ar", "arplus", "no-rezero", "no-albert", "no-factor-ff", "no-memn2n", "no-bart-mlm"]

# What each row has that AR+ has not: one method less, or for AR all five.
DIFFERENCES: dict[str, dict[str, Any]] = {
    "arplus": {},
    "no-rezero": {"rezero": False},
    "no-albert": {"repeats": 1, "embedding_size": 512},
    "no-factor-ff": {"ff_bottleneck": None},
    "no-memn2n": {"memory_hops": 0},
    "no-bart-mlm": {"auxiliary": "lm"},
    "ar": {
        "rezero": False,
        "repeats": 1,
        "embedding_size": 512,
        "ff_bottleneck": None,
        "memory_hops": 0,
        "auxiliary": "lm",
        "tied_head": True,
        "decoder_norm": False,
    },
}

LEARNING_RATES = {
    "ar": 1.5e-4,
    "arplus": 2e-3,
    "no-rezero": 1.5e-4,
    "no-albert": 2e-3,
    "no-factor-ff": 1.5e-4,
    "no-memn2n": 1.5e-4,
    "no-bart-mlm": 1.5e-4,
}


def test_the_presets_are_the_papers_seven_rows() -> None:
    assert list(PAPER_ROWS) == ROWS
    assert list(PRESETS) == [*ROWS, "arplus-large", "ar-weighted", "arplus-weighted"]
    assert all(row.preset == name for name, row in PRESETS.items())


def test_ar_plus_has_the_papers_sizes() -> None:
    assert asdict(preset("arplus").model) == {
        "layers": 6,
        "repeats": 6,
        "d_model": 512,
        "embedding_size": 200,
        "heads": 8,
        "ff_size": 2048,
        "ff_bottleneck": 100,
        "activation": "relu",
        "rezero": True,
        "gate_start": 0.0,
        "shared_stacks": True,
        "fixed_attention": 0.1,
        "memory_hops": 3,
        "memory_tying": "adjacent",
        "auxiliary": "infilling",
        "tied_head": False,
        "decoder_norm": True,
        "adapter": None,
        "dropout": 0.1,
        "features": {
            "path": None,
            "use": "replace",
            "layers": "-2",
            "combine": "mean",
            "width": None,
            "digest": None,
        },
        "persona_weight": "one",
    }
    assert VocabularySizes() == VocabularySizes(characters=9_498, persona_words=10_011)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_differs_from_ar_plus_in_its_methods_alone(name: str) -> None:
    ours, full = asdict(preset(name).model), asdict(preset("arplus").model)
    assert {key: value for key, value in ours.items() if value != full[key]} == DIFFERENCES[name]


@pytest.mark.parametrize("name", ROWS)
def test_every_row_trains_as_the_papers_code_did(name: str) -> None:
    row = preset(name)
    assert asdict(row.optimizer) == {
        "lr": LEARNING_RATES[name],
        "eps": 1e-8 if name == "ar" else 1e-6,
        "weight_decay": 0.05,
        "max_grad_norm": 1.0,
        "schedule": "plateau",
        "warmup": 0,
        "plateau_factor": 0.5,
        "plateau_patience": 60,
        "min_lr": 1.5e-4,
        "only": (),
    }
    assert (row.batch_size, row.epochs) == (64, 3)
    assert (row.objective.lambda0, row.objective.lambda1) == (1, 0.5)


def test_sampling_is_the_papers() -> None:
    assert asdict(Sampling()) == {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 0,
        "max_characters": None,
        "min_characters": 1,
    }
    assert Sampling().of(ExampleRules()).max_characters == 15


def test_the_shortest_reply_is_no_longer_than_the_longest() -> None:
    with pytest.raises(UsageError, match=r"--sampling.min-characters: must be at most max_characters = 5 \(got 6\)"):
        validate(ChatConfig(checkpoint="c", sampling=Sampling(min_characters=6, max_characters=5)))


def test_the_largest_vocabularies_prepared_are_the_papers() -> None:
    prepare, sizes = PrepareConfig(), VocabularySizes()
    assert prepare.max_characters + 9 == sizes.characters
    assert prepare.max_persona_words + 9 == sizes.persona_words


def test_special_tokens_take_the_last_nine_ids() -> None:
    assert special_ids(20) == tuple(range(11, 20))
    assert special_ids(20)._fields == ("pad", "bos", "eos", "unk", "sep", "spe1", "spe2", "mask", "cls")
    assert [token.strip("[]").lower() for token in config_module.SPECIAL_TOKENS] == list(special_ids(20)._fields)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_passes_its_own_checks_and_shrinks_to_the_same_row(name: str) -> None:
    row = preset(name)
    assert validate(row) == row
    small = tiny(row)
    assert validate(small) == small
    assert small.preset == name
    # What makes the row the row stays, in the terms of the small network.
    kept = ("rezero", "auxiliary", "tied_head", "decoder_norm", "dropout", "fixed_attention")
    assert {k: getattr(small.model, k) for k in kept} == {k: getattr(row.model, k) for k in kept}
    assert small.model.memory_hops == min(row.model.memory_hops, 1)
    assert (small.model.ff_bottleneck is None) == (row.model.ff_bottleneck is None)
    assert (small.model.embedding_size == small.model.d_model) == (row.model.embedding_size == row.model.d_model)
    assert (small.model.unique_layers == 1) == (row.model.unique_layers == 1)
    assert (small.model.repeats == 1) == (row.model.repeats == 1)
    assert small.model.d_model < row.model.d_model


def test_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(UsageError, match=r"unknown preset 'gpt'.*ar, arplus, no-rezero"):
        preset("gpt")


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("Tesla T4", 65),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("AMD Instinct MI300X", None),
    ],
)
def test_a_gpu_is_known_by_the_name_that_torch_gives_it(device: str, tflops: float | None) -> None:
    assert peak_flops(device) == (tflops and tflops * 1e12)
