"""Weights of the paper's own code (github.com/ghosthamlet/persona), so that its users keep what they have trained.

Its ``state_dict`` holds shared tensors under several names, weights that are never used, and the tables of positions.
Here each of our parameters knows every name that it can have there: the first one found is taken, the others must
agree. Names that no version of that code has are an error.
"""

import dataclasses
import io
import re
from collections.abc import Mapping

import safetensors.torch
import torch
from torch import Tensor

from arplus.config import ModelConfig, VocabularySizes
from arplus.errors import UsageError
from arplus.model.network import PersonaTransformer


def parse_state(data: bytes, name: str) -> dict[str, Tensor]:
    """The tensors in a file's content: safetensors where ``name`` says so, else ``torch.save`` of a state_dict.

    Of a file with ``param.*`` names (this repository's golden files) only these are taken. Raises
    :class:`UsageError` for a file that is neither.
    """
    try:
        if name.endswith(".safetensors"):
            state = safetensors.torch.load(data)
        else:
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        if not all(isinstance(value, Tensor) for value in state.values()):
            raise ValueError("it holds more than tensors; save the model's state_dict alone")
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError
        raise UsageError(f"{name}: cannot be read as weights ({error})") from None
    parameters = {key.removeprefix("param."): value for key, value in state.items() if key.startswith("param.")}
    return parameters or dict(state)


_UNUSED = re.compile(
    r"(context_emb|persona_emb|seq_emb|output_emb)\.(pos_encoder\.pe|emb\.weight|persona_emb\.weight|proj\.(weight|bias))"
    r"|(post_encoder(\.transformer_encoder)?|resp_decoder)\.layers\.\d+\."
    r"(cls|pre_norm|norm1|norm2)\.(weight|bias)"
    r"|(post_encoder|resp_decoder)\.layers\.\d+\.resweight"
    r"|mem_output_map\.weight"
)
"""What the paper's code may hold without using it (which, depends on the row) or computes itself (positions)."""


def sources(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """For each of our parameters, its names in the paper's code. The first is the usual one."""
    found: dict[str, tuple[str, ...]] = {}
    character_owners = ["context_emb.emb", "output_emb.emb", "seq_emb.emb"]
    if config.memory_hops:
        found["persona_words.weight"] = ("context_emb.persona_emb.weight", "persona_emb.emb.weight")
        found |= _memory(config)
    else:
        character_owners += ["persona_emb.emb", "context_emb.persona_emb"]
    if config.tied_head:
        character_owners.append("generater.out")
    else:
        found["head.weight"] = ("generater.out.weight",)
    found["characters.weight"] = tuple(f"{owner}.weight" for owner in character_owners)

    inputs = {"context_input": "context_emb", "response_input": "output_emb"}
    if not config.memory_hops:
        inputs["persona_input"] = "persona_emb"
    if config.memory_hops or config.auxiliary == "infilling":
        inputs["auxiliary_input"] = "seq_emb"
    layer_parts = {
        "attention.query_key_value.": "{attention}.in_proj_",
        "attention.output.": "{attention}.out_proj.",
    }
    if config.ff_bottleneck is None:
        layer_parts |= {"feed_forward.expand.": "linear1.", "feed_forward.contract.": "linear2."}
    else:
        layer_parts |= {"feed_forward.narrow.": "linear1.", "feed_forward.widen.": "linear2."}
        layer_parts |= {"feed_forward.expand.": "fac_linear1.", "feed_forward.contract.": "fac_linear2."}
    for kind in ("weight", "bias"):
        if config.embedding_size != config.d_model:
            for ours, theirs in inputs.items():
                found[f"{ours}.projection.{kind}"] = (f"{theirs}.proj.{kind}",)
    for ours_stack, (stacks, norms) in _stacks(config).items():
        for i in range(config.unique_layers):
            for ours, theirs in (layer_parts | {f"{name}.": f"{name}." for name in norms}).items():
                for kind in ("weight", "bias"):
                    found[f"{ours_stack}.{i}.{ours}{kind}"] = _layer_names(i, f"{theirs}{kind}", stacks)
            if config.rezero:
                found[f"{ours_stack}.{i}.r"] = _layer_names(i, "resweight", stacks)
    if config.persona_weight == "predicted":  # that code's own predictor cannot run, so no file has one
        found |= {name: (name,) for name in ("predictor.w", "predictor.c")}
    return found


def _memory(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    if config.memory_tying == "layer-wise":
        theirs = {"tables.0": "mem_input.emb", "tables.1": "mem_output.emb"}
        theirs |= {"query_map": "mem_output_map"} if config.memory_hops > 1 else {}
        return {f"memory.{ours}.weight": (f"{name}.weight",) for ours, name in theirs.items()}
    found: dict[str, tuple[str, ...]] = {}
    last = config.memory_hops
    for h in range(last + 1):
        names = [f"mem_input.{h}.emb.weight"] * (h < last) + [f"mem_output.{h - 1}.emb.weight"] * (h > 0)
        found[f"memory.tables.{h}.weight"] = tuple(names)
    return found


_Stacks = tuple[tuple[str, str], ...]
_ENCODER: _Stacks = (("post_encoder", "self_attn"), ("post_encoder.transformer_encoder", "self_attn"))
"""AR+'s and AR's, and what attention is called in it."""
_DECODER: _Stacks = (("resp_decoder", "multihead_attn"),)


def _stacks(config: ModelConfig) -> dict[str, tuple[_Stacks, list[str]]]:
    """Our lists of layers: the stacks that they are in the paper's code, and the norms that they use."""
    of_encoder = ["norm1", "norm2"]
    of_decoder = ["norm1", "pre_norm" if config.decoder_norm else "norm2"]
    if config.rezero:
        of_encoder = of_decoder = ["pre_norm"]
    if config.shared_stacks:
        return {"layers": (_ENCODER + _DECODER, list(dict.fromkeys(of_encoder + of_decoder)))}
    return {"layers": (_DECODER, of_decoder), "encoder_layers": (_ENCODER, of_encoder)}


def _layer_names(i: int, name: str, stacks: _Stacks = _ENCODER + _DECODER) -> tuple[str, ...]:
    """Names of a layer's parameter in each of these stacks."""
    return tuple(f"{stack}.layers.{i}.{name.format(attention=attention)}" for stack, attention in stacks)


def _shares_stacks(state: Mapping[str, Tensor]) -> bool:
    """Whether encoder and decoder agree, as far as the file has both."""
    name = "linear1.weight"
    both = [[state[n] for n in _layer_names(0, name, stacks) if n in state] for stacks in (_ENCODER, _DECODER)]
    return not all(both) or torch.equal(both[0][0], both[1][0])


def from_reference(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our ``state_dict`` from the paper code's. Raises :class:`UsageError` for names missing, unknown or at odds."""
    state = _plain(state)
    known, ours, missing = set[str](), {}, []
    for name, theirs in sources(config).items():
        known.update(theirs)
        present = [n for n in theirs if n in state]
        if not present:
            missing.append(theirs[0])
            continue
        value = state[present[0]]
        for other in present[1:]:
            if not torch.equal(state[other], value):
                raise UsageError(
                    f"reference weights: {present[0]} and {other} differ, but the paper's code shares them"
                )
        ours[name] = value.detach().float().clone()
    if missing:
        raise UsageError(f"reference weights: this preset needs {_some(missing)}, which the file lacks; try another")
    unknown = [name for name in state if name not in known and not _UNUSED.fullmatch(name)]
    if unknown:
        raise UsageError(f"reference weights: this preset has no place for {_some(unknown)}; try another")
    if config.tied_head:
        ours["head.weight"] = ours["characters.weight"]
    return ours


def infer(state: Mapping[str, Tensor], base: ModelConfig) -> tuple[ModelConfig, VocabularySizes]:
    """The configuration of reference weights: sizes from their shapes, the rest (row, heads, layers) from ``base``.

    What encoder and decoder share is the file's to say, and what the memory's hops do, but not how many hops a
    layer-wise memory has. Where ``base`` shares layers, its total number of layers stands; where not, the file's does.
    Raises :class:`UsageError` where the file cannot be of this row.
    """
    state = _plain(state)

    def shape(*names: str) -> torch.Size:
        for name in names:
            if name in state:
                return state[name].shape
        raise UsageError(f"reference weights: no {names[0]} in the file; is it a state_dict of the paper's code?")

    characters, embedding_size = shape("context_emb.emb.weight", "output_emb.emb.weight", "seq_emb.emb.weight")
    d_model = shape(*_layer_names(0, "{attention}.out_proj.weight"))[0]
    first = shape(*_layer_names(0, "linear1.weight"))[0]
    factored = [name for name in _layer_names(0, "fac_linear1.weight") if name in state]
    layer_wise = "mem_input.emb.weight" in state
    hops = 1 + max((int(m[1]) for n in state if (m := re.match(r"mem_(?:in|out)put\.(\d+)\.", n))), default=-1)
    hops = base.memory_hops if layer_wise else hops
    unique = 1 + max(int(m[1]) for n in state if (m := re.search(r"\.layers\.(\d+)\.", n)))
    for name, in_file, in_base in (
        ("a MemN2N memory", layer_wise or hops > 0, base.memory_hops > 0),
        ("a factored feed-forward layer", bool(factored), base.ff_bottleneck is not None),
        ("an embedding of its own width", embedding_size != d_model, base.embedding_size != base.d_model),
    ):
        if in_file != in_base:
            has, lacks = ("file", "preset") if in_file else ("preset", "file")
            raise UsageError(f"reference weights: the {has} has {name} and the {lacks} has not; choose another preset")
    layers = unique if base.repeats == 1 else base.layers
    if layers % unique:
        raise UsageError(f"reference weights: {unique} layers in the file do not divide the preset's {layers} layers")
    if d_model % base.heads:
        raise UsageError(f"reference weights: {base.heads} heads do not divide the file's d_model = {d_model}")
    config = dataclasses.replace(
        base,
        layers=layers,
        repeats=layers // unique,
        d_model=d_model,
        embedding_size=embedding_size,
        ff_size=state[factored[0]].shape[0] if factored else first,
        ff_bottleneck=first if factored else None,
        memory_hops=hops,
        memory_tying="layer-wise" if layer_wise else "adjacent",
        shared_stacks=_shares_stacks(state),
    )
    if not hops:
        return config, VocabularySizes(characters=characters)
    words = shape("context_emb.persona_emb.weight", "persona_emb.emb.weight")[0]
    return config, VocabularySizes(characters=characters, persona_words=words)


def load_reference(state: Mapping[str, Tensor], config: ModelConfig, sizes: VocabularySizes) -> PersonaTransformer:
    """A model with the paper code's weights. Raises :class:`UsageError` where names or shapes do not fit."""
    model = PersonaTransformer(config, sizes)
    ours, expected = from_reference(state, config), model.state_dict()
    shapes = [(name, tuple(ours[name].shape), tuple(value.shape)) for name, value in expected.items()]
    wrong = [f"{name} {theirs} instead of {wanted}" for name, theirs, wanted in shapes if theirs != wanted]
    if wrong:
        raise UsageError(f"reference weights: wrong shapes for this preset and vocabulary: {_some(wrong)}")
    model.load_state_dict(ours)
    return model


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefix that DataParallel gives its names."""
    return {name.removeprefix("module."): value for name, value in state.items()}


def _some(names: list[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
