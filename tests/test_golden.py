"""Parity with the paper's own code: weights, inputs, outputs and gradients that it produced, at small sizes.

``ARPLUS_GOLDEN`` names the folder; nothing here assumes its sizes, groups, hops, rows or numbers of cases.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from arplus import kernels
from arplus.config import ModelConfig, VocabularySizes
from arplus.kernels import BACKENDS
from arplus.model.batch import Batch, Packed
from arplus.model.generate import Sampling, generate, top_probabilities
from arplus.model.network import PersonaTransformer
from arplus.model.reference import infer, load_reference, sources

GOLDEN = Path(os.environ.get("ARPLUS_GOLDEN") or Path(__file__).parent / "golden")
FILES = sorted(GOLDEN.glob("*.safetensors"))
METRICS = json.loads((GOLDEN / "metrics.json").read_text())
SPECIALS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[SEP]", "[SPE1]", "[SPE2]", "[MASK]", "[CLS]")


def settings(theirs: dict, bottleneck: int | None) -> ModelConfig:
    """Our configuration for the reference's; AR's file has few keys, since its code had no such options."""
    plus = "emb_dim" in theirs
    return ModelConfig(
        layers=theirs["num_layers"],
        repeats=theirs.get("num_groups", 1),
        d_model=theirs["d_model"],
        embedding_size=theirs.get("emb_dim", theirs["d_model"]),
        heads=theirs["n_head"],
        ff_size=theirs["d_ff"],
        ff_bottleneck=bottleneck if theirs.get("factor_ff") else None,
        rezero=theirs.get("use_rezero", False),
        memory_hops=theirs["mem_n2n_hops"] if theirs.get("use_mem_n2n") else 0,
        memory_tying="layer-wise" if theirs.get("mem_n2n_layer_share") == "layer_wise" else "adjacent",
        shared_stacks=theirs.get("share_encoder_decoder", True),
        auxiliary="infilling" if theirs.get("auxiliary_task") == "MLM" else "lm",
        tied_head=not plus,
        decoder_norm=plus,
        dropout=0.0,
    )


class Golden:
    """One file of the folder, and the model that it describes."""

    def __init__(self, path: Path, backend: str | None, device: torch.device) -> None:
        self.backend, self.device = backend, device
        self.golden = json.loads(path.with_suffix(".json").read_text())
        tensors = load_file(path)
        self.tensors = tensors
        self.state = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
        self.gradients = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
        self.cases = self.golden["cases"]
        inner = next(len(v) for k, v in self.state.items() if k.endswith("layers.0.linear1.bias"))
        self.config = settings(self.golden["config"], inner)
        characters = self.golden["char_vocab_size"]
        self.sizes = VocabularySizes(
            characters=characters, persona_words=self.golden["persona_vocab_size"] or characters
        )
        self.ids = self.golden["char_special_ids"]

    def model(self) -> PersonaTransformer:
        """The model with the file's weights; it computes with the plain operations or those of a backend."""
        model = load_reference(self.state, self.config, self.sizes).eval()
        alpha = self.golden["config"].get("attn_alpha", 1)
        model.persona_weight = None if alpha == 1 else alpha
        if self.backend is not None:
            kernels.use(model, torch.device(self.backend))
        return model.to(self.device)

    def batch(self, cases: list[dict], blocks: list[int] | None = None) -> Batch:
        """The cases as one batch, in blocks of so many each."""

        def packed(rows: list[list[int]]) -> Packed:
            return Packed.of(rows, blocks)

        profiles = [
            [
                [*words, *tags]
                for words, tags in zip(case["speaker_persona_words"], case["speaker_tag_words"], strict=True)
            ]
            for case in cases
        ]
        first = np.cumsum([0, *map(len, profiles)])
        speakers = [first[i] + s - 1 for i, case in enumerate(cases) for s in case["context_speaker"]]
        masked = self.config.auxiliary == "infilling"
        return Batch(
            example_id_B=torch.arange(len(cases)),
            context=packed([case["context"] for case in cases]),
            speaker_N=torch.tensor(np.array(speakers)),
            profiles=Packed.of([profile for case in profiles for profile in case]),
            persona=packed([case["target_persona"] for case in cases]),
            response=packed([case["response"][:-1] for case in cases]),
            target_N=torch.tensor([i for case in cases for i in case["response"][1:]]),
            infilled=packed([case["infilled_response"] for case in cases]) if masked else None,
        ).to(self.device)

    def reference_name(self, names) -> str:
        """The name, of all those of a shared tensor, that the file stores."""
        return next(name for name in names if name in self.state)


@pytest.fixture(params=["plain", *BACKENDS, pytest.param("plain on gpu", marks=pytest.mark.gpu)])
def computing(request, gpu: torch.device) -> tuple[str | None, torch.device]:
    """Which operations compute, and where."""
    backend, _, on_gpu = request.param.partition(" on ")
    return None if backend == "plain" else backend, gpu if on_gpu else torch.device("cpu")


@pytest.fixture(params=FILES, ids=lambda path: path.stem)
def golden(request, computing: tuple[str | None, torch.device]) -> Golden:
    return Golden(request.param, *computing)


def test_folder_is_not_empty():
    assert FILES, f"no golden file in {GOLDEN}"


def test_special_ids_are_where_we_expect_them(golden):
    n = golden.sizes.characters
    assert [golden.ids[name] for name in SPECIALS] == list(range(n - 9, n))


def test_sizes_are_inferred_from_the_shapes(golden):
    config, sizes = infer(golden.state, golden.config)
    assert config == golden.config
    assert sizes.characters == golden.sizes.characters
    assert not config.memory_hops or sizes == golden.sizes


@torch.no_grad()
def test_logits_of_single_cases(golden):
    model = golden.model()
    for k, case in enumerate(golden.cases):
        batch = golden.batch([case])
        whole = Packed.of([case["response"]]).to(golden.device)  # with its [EOS], after which nothing is asked
        response = model.head(model.decode(whole, model.encode(batch))).cpu()
        torch.testing.assert_close(response, golden.tensors[f"case{k}.logits_response"], atol=2e-5, rtol=0)
        memories = [] if batch.infilled is None else [model.encode_infilled(batch.infilled)]
        auxiliary = model.head(model.decode(batch.response, memories)).cpu()
        torch.testing.assert_close(auxiliary, golden.tensors[f"case{k}.logits_auxiliary"], atol=2e-5, rtol=0)


@torch.no_grad()
def test_losses_of_single_cases(golden):
    model = golden.model()
    for case in golden.cases:
        batch = golden.batch([case])
        losses, targets = model(batch), len(batch.target_N)
        assert float(losses.sum_dialogue / targets) == pytest.approx(case["loss_dialogue"], abs=1e-5)
        assert float(losses.sum_auxiliary / targets) == pytest.approx(case["loss_auxiliary"], abs=1e-5)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_losses_and_gradients_of_all_cases_as_one_batch(golden, in_blocks):
    model = golden.model()
    expected = golden.golden["batch"]
    batch = golden.batch(golden.cases, [1, len(golden.cases) - 1] if in_blocks else None)
    losses, targets = model(batch), len(batch.target_N)
    assert targets == expected["dialogue_targets"] == expected["auxiliary_targets"]
    dialogue = losses.sum_dialogue / targets
    auxiliary = losses.sum_auxiliary / targets
    total = dialogue + golden.golden["config"]["alpha"] * auxiliary
    assert dialogue.item() == pytest.approx(expected["loss_dialogue"], abs=1e-5)
    assert auxiliary.item() == pytest.approx(expected["loss_auxiliary"], abs=1e-5)
    assert total.item() == pytest.approx(expected["loss_total"], abs=1e-5)

    total.backward()
    checked = set()
    for name, names in sources(golden.config).items():
        theirs = golden.reference_name(names)
        want = golden.gradients[theirs]
        got = model.get_parameter(name).grad
        assert got is not None, name
        got = got.cpu()
        error = ((got - want).norm() / want.norm()).item()
        assert error <= 1e-4, f"{name} ({theirs}): {error:.2e}"
        checked.add(theirs)
    assert checked == set(golden.gradients), "every gradient of the file is compared"


def test_greedy_replies(golden):
    model = golden.model()
    steps = 8
    greedy = Sampling(temperature=0, max_characters=steps, min_characters=0)
    pad, eos = golden.ids["[PAD]"], golden.ids["[EOS]"]
    model.fold()
    replies = generate(model, golden.batch(golden.cases), greedy)
    for case, reply in zip(golden.cases, replies.tolist(), strict=True):
        assert [*(i for i in reply if i != pad), eos] == case["greedy_8_steps"]


@pytest.mark.parametrize("case", METRICS["top_filtering"], ids=lambda c: f"p{c['top_p']}-k{c['top_k']}")
def test_top_filtering(case):
    logits = torch.tensor([case["logits"], case["logits"]])
    kept = top_probabilities(logits, top_k=case["top_k"], top_p=case["top_p"]) > 0
    assert kept[0].nonzero().flatten().tolist() == case["kept"]
    assert kept[1].equal(kept[0])
