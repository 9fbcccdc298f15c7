"""Weights of BERT, ELECTRA or ALBERT as the start of ours (``--init.pretrained``).

A layer of theirs becomes a layer of ours that has its form: attention, the plain feed-forward layer, and norms, which
stand after the branches there and before them here, so that a layer's first norm is the last one of the layer before
it. Not taken are positions, types, the norm of projected embeddings, and the pooler; the output head, the memory and
the persona table start as ever.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from arplus.config import InitConfig, ModelConfig, flag
from arplus.errors import UsageError
from arplus.model.network import PersonaTransformer
from arplus.pretrained import models
from arplus.text import Vocabulary

FLAG = "init.pretrained"
_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu-tanh", "gelu_pytorch_tanh": "gelu-tanh"}
Names = dict[str, tuple[str, ...]]
"""Our module's name in a layer → theirs, whose tensors are stacked."""


def initialise(model: PersonaTransformer, characters: Vocabulary, init: InitConfig) -> str:
    """Sets the weights of ``model`` that ``init`` names to the pretrained model's; what was set, in words.

    Raises :class:`UsageError` where they do not fit, with the flags that make them fit; see also :func:`models.load`.
    """
    assert init.pretrained is not None
    source = models.load(init.pretrained, FLAG, init.digest)
    theirs, config = source.network.config, model.config
    what = f"--{FLAG} {init.pretrained}"
    _check_kind(theirs, what)
    _check_sizes(theirs, config, what)
    weights = source.network.state_dict()
    layers = _layers(theirs)
    chosen = choose(config.unique_layers, len(layers), init.layers, repeated=theirs.model_type == "albert")
    if chosen is None:
        raise UsageError(
            f"{what}: has {len(layers)} layers, and the network has {config.unique_layers} unique ones; "
            "set --model.layers and --model.repeats so that layers / repeats is at most that"
        )
    wanted: Names = {}
    for part, stack in (("decoder", "layers"), ("encoder", "encoder_layers")):
        if part in init.parts_set and hasattr(model, stack):
            wanted |= {f"{stack}.{i}.{ours}": names for i, k in enumerate(chosen) for ours, names in layers[k].items()}
    if "projections" in init.parts_set:
        projection = "embeddings_project" if theirs.model_type == "electra" else "encoder.embedding_hidden_mapping_in"
        inputs = ("context_input", "auxiliary_input", "persona_input", "response_input")
        wanted |= {f"{name}.projection": (projection,) for name in inputs if f"{projection}.weight" in weights}
    taken = _copy(model, weights, wanted)
    said = [f"layers {', '.join(map(str, dict.fromkeys(chosen)))} of {len(layers)}"]
    if "embeddings" in init.parts_set:
        ids = models.their_ids(characters, source.vocabulary)
        share = models.coverage(characters, ids)
        if share < models.LEAST_COVERAGE:
            raise UsageError(
                f"{what}: its vocabulary knows {share:.0%} of the text's characters, less than "
                f"{models.LEAST_COVERAGE:.0%}; take a model of Chinese, or leave embeddings out of --init.parts"
            )
        taken += _copy_rows(model.characters.weight, weights["embeddings.word_embeddings.weight"], ids)
        known = sum(i is not None for i in ids)
        said.append(f"{known:,} of {len(ids):,} characters, {share:.1%} of the text")
    total = sum(p.numel() for p in model.parameters())
    if config.rezero and not config.gate_start:
        said.append("the gates start shut, so --model.gate-start 1 would let the layers act at once")
    if _ACTIVATIONS.get(theirs.hidden_act) != config.activation:
        said.append(f"its activation is {theirs.hidden_act}, the network's {config.activation}")
    return f"{what}: {taken:,} of {total:,} parameters are its, the others start as ever; {'; '.join(said)}"


def choose(unique: int, there: int, how: str, *, repeated: bool) -> list[int] | None:
    """Which of their layers each unique one of ours is set to: the ``last`` ones, or ``spread`` evenly up to the last.

    Fewer than ours are taken in turn where they are ``repeated`` in their own model too; else there is no answer.
    """
    if unique > there:
        return [i % there for i in range(unique)] if repeated else None
    if how == "last":
        return list(range(there - unique, there))
    return [(i + 1) * there // unique - 1 for i in range(unique)]


def _check_kind(theirs: Any, what: str) -> None:
    kind = theirs.model_type
    if kind == "xlnet":
        raise UsageError(
            f"{what}: is an XLNet, whose attention is relative, without biases and with terms for segments and "
            "positions, so that its weights have no place in ours; take a BERT, ELECTRA or ALBERT, or its features "
            "(--model.features.path)"
        )
    if kind not in ("bert", "electra", "albert"):
        raise UsageError(f"{what}: is of kind {kind!r}; weights are taken from a BERT, ELECTRA or ALBERT")


def _check_sizes(theirs: Any, config: ModelConfig, what: str) -> None:
    sizes = {
        "d_model": theirs.hidden_size,
        "heads": theirs.num_attention_heads,
        "ff_size": theirs.intermediate_size,
        "embedding_size": getattr(theirs, "embedding_size", theirs.hidden_size),
        "ff_bottleneck": None,
    }
    if any(getattr(config, name) != size for name, size in sizes.items()):
        wanted = sizes | ({"gate_start": 1} if config.rezero else {})
        activation = _ACTIVATIONS.get(theirs.hidden_act)
        wanted |= {"activation": activation} if activation else {}
        flags = " ".join(f"--{flag(f'model.{name}')} {value}" for name, value in wanted.items())
        raise UsageError(f"{what}: has other sizes than the network; add {flags}")


def _layers(theirs: Any) -> list[Names]:
    """Their layers, in the order in which they are applied, each once."""
    found: list[Names] = []
    if theirs.model_type == "albert":
        for g in range(theirs.num_hidden_groups):
            for j in range(theirs.inner_group_num):
                of = f"encoder.albert_layer_groups.{g}.albert_layers.{j}"
                names = {"attention.output": f"{of}.attention.dense", "norm1": f"{of}.attention.LayerNorm"}
                names |= {"feed_forward.expand": f"{of}.ffn", "feed_forward.contract": f"{of}.ffn_output"}
                names |= dict.fromkeys(("norm2", "pre_norm"), f"{of}.full_layer_layer_norm")
                found.append(_stacked(names, f"{of}.attention"))
        return found
    before = "embeddings.LayerNorm"
    for k in range(theirs.num_hidden_layers):
        of = f"encoder.layer.{k}"
        names = {"attention.output": f"{of}.attention.output.dense", "norm1": f"{of}.attention.output.LayerNorm"}
        names |= {"feed_forward.expand": f"{of}.intermediate.dense", "feed_forward.contract": f"{of}.output.dense"}
        if k or getattr(theirs, "embedding_size", None) in (None, theirs.hidden_size):
            names |= dict.fromkeys(("norm2", "pre_norm"), before)  # else it is of another width
        found.append(_stacked(names, f"{of}.attention.self"))
        before = f"{of}.output.LayerNorm"
    return found


def _stacked(names: dict[str, str], attention: str) -> Names:
    query_key_value = tuple(f"{attention}.{name}" for name in ("query", "key", "value"))
    return {"attention.query_key_value": query_key_value} | {ours: (name,) for ours, name in names.items()}


@torch.no_grad()
def _copy(model: PersonaTransformer, weights: Mapping[str, Tensor], wanted: Names) -> int:
    """Sets what the model has of ``wanted``; how many parameters that was."""
    own, taken = dict(model.named_parameters()), 0
    for ours, names in wanted.items():
        for kind in ("weight", "bias"):
            if (parameter := own.get(f"{ours}.{kind}")) is not None:
                parameter.copy_(torch.cat([weights[f"{name}.{kind}"] for name in names]))
                taken += parameter.numel()
    return taken


@torch.no_grad()
def _copy_rows(table_VE: Tensor, theirs: Tensor, ids: Sequence[int | None]) -> int:
    rows = [(ours, i) for ours, i in enumerate(ids) if i is not None]
    ours, i = (torch.tensor(column, device=table_VE.device) for column in zip(*rows, strict=True))
    table_VE.index_copy_(0, ours, theirs.to(table_VE.device)[i])
    return len(rows) * table_VE.shape[1]
