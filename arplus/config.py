"""Every setting of every job: typed, documented, with one default in one place.

The presets are the paper's rows: AR, AR+, and AR+ without one of its five methods (Tables 1 and 2). A configuration
is a tree of frozen dataclasses. The command line is made from these types (:mod:`arplus.cli`); :func:`from_dict`
reads the ``config.json`` that every run writes, and is the one place where values are checked.
"""

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from annotated_types import Ge, Gt, Le, Lt
from pydantic import TypeAdapter, ValidationError

from arplus.errors import UserError

SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[UNK]", "[SEP]", "[SPE1]", "[SPE2]", "[MASK]", "[CLS]")
"""The paper's nine special tokens. They take the last nine ids of either vocabulary, in this order."""


class SpecialIds(NamedTuple):
    """Ids of the special tokens in a vocabulary; see :func:`special_ids`."""

    pad: int
    bos: int
    eos: int
    unk: int
    sep: int
    spe1: int
    spe2: int
    mask: int
    cls: int


def special_ids(vocabulary_size: int) -> SpecialIds:
    """Ids of the special tokens, which follow the ``vocabulary_size - 9`` ordinary entries."""
    return SpecialIds(*range(vocabulary_size - len(SPECIAL_TOKENS), vocabulary_size))


@dataclass(frozen=True, kw_only=True)
class VocabularySizes:
    """Sizes of the two vocabularies, special tokens included. The defaults are the paper's."""

    characters: Annotated[int, Gt(len(SPECIAL_TOKENS))] = 9_498
    """Characters of the dialogues."""
    persona_words: Annotated[int, Gt(len(SPECIAL_TOKENS))] = 10_011
    """Whole persona words: the keys 性别, 地址 and 兴趣, genders, places, tags."""


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One member of the model family. The defaults are AR+; see :data:`PRESETS`."""

    layers: Annotated[int, Gt(0)] = 6
    """Layers applied, in the encoder and in the decoder."""
    groups: Annotated[int, Gt(0)] = 6
    """How often the unique layers are applied in turn: layers / groups layers have weights of their own (ALBERT)."""
    d_model: Annotated[int, Gt(0)] = 512
    """Width d of the hidden states."""
    embedding_size: Annotated[int, Gt(0)] = 200
    """Width E of the embedding tables; projected to d where it differs (ALBERT)."""
    heads: Annotated[int, Gt(0)] = 8
    """Attention heads; must divide d."""
    ff_size: Annotated[int, Gt(0)] = 2048
    """Width of the feed-forward layer."""
    ff_bottleneck: Annotated[int, Gt(0)] | None = 100
    """Inner width of the factored feed-forward layer; None for the plain layer of two matrices."""
    rezero: bool = True
    """Gate each residual branch with one learnt scalar that starts at zero (Eq. 5) instead of post-normalising."""
    fixed_attention: Annotated[float, Ge(0)] = 0.1
    """b of Eq. 5: the share of O_T and O_C that bypasses the ReZero gate."""
    memory_hops: Annotated[int, Ge(0)] = 3
    """Hops of the MemN2N persona memory; 0 encodes the persona with the encoder instead (O_T then exists)."""
    auxiliary: Literal["infilling", "lm"] = "infilling"
    """The task behind L_LM: BART-style infilling of the response, or next-character language modelling."""
    tied_generator: bool = False
    """Use the character table as output matrix too (AR); needs embedding_size = d_model."""
    decoder_norm: bool = True
    """Without ReZero: the decoder's first norm has weights of its own; AR shares the encoder's."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Dropout on embeddings, attention weights and residual branches."""

    @property
    def unique_layers(self) -> int:
        """Layers with weights of their own."""
        return self.layers // self.groups

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.layers % self.groups:
            yield "groups", f"must divide layers = {self.layers} (got {self.groups})"
        if self.d_model % self.heads:
            yield "heads", f"must divide d_model = {self.d_model} (got {self.heads})"
        if self.tied_generator and self.embedding_size != self.d_model:
            yield "embedding_size", f"must equal d_model = {self.d_model} when tied_generator is on"


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """L = L_D + λ1 · L_LM (Eq. 4)."""

    lambda1: Annotated[float, Ge(0)] = 0.5
    """λ1, the weight of the auxiliary loss."""


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW as the paper uses it, and the plateau schedule of its learning rate."""

    lr: Annotated[float, Gt(0)] = 2e-3
    """Initial learning rate."""
    eps: Annotated[float, Gt(0)] = 1e-6
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Ge(0)] = 0.05
    """Decoupled weight decay, on every parameter as in the paper's code."""
    clip: Annotated[float, Gt(0)] = 1.0
    """Largest global gradient norm."""
    plateau_factor: Annotated[float, Gt(0), Lt(1)] = 0.5
    """Factor on the learning rate when the training loss has not improved for plateau_patience steps."""
    plateau_patience: Annotated[int, Ge(0)] = 60
    """Steps without a better total loss before the learning rate falls."""
    min_lr: Annotated[float, Ge(0)] = 1.5e-4
    """Floor of the schedule."""


@dataclass(frozen=True, kw_only=True)
class FeedConfig:
    """How Ray Data turns the encoded examples into batches."""

    window_batches: Annotated[int, Gt(0)] = 256
    """Global batches a window: a window is shuffled, sorted by length and cut into batches of like length."""
    prefetch: Annotated[int, Gt(0)] = 2
    """Windows prepared ahead of the training step."""
    static_shapes: bool = False
    """Pad every batch to one of a few fixed shapes, for kernels that are compiled a shape."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One training run."""

    preset: str = "arplus"
    """Row of the paper that this configuration started from; a label."""
    data: str = ""
    """URI of a prepared data set (the output of jobs/prepare.py)."""
    storage: str = "runs"
    """URI under which every run has a folder of its own."""
    run_name: str = ""
    """Name of the run and of its folder; the preset's name where empty."""
    workers: Annotated[int, Gt(0)] = 1
    """Training workers, one GPU each where there are GPUs."""
    worker_cpus: Annotated[float, Gt(0)] | None = None
    """CPUs a worker; by default what leaves one whole CPU to the data feed."""
    zero: Annotated[int, Ge(0), Le(3)] = 1
    """DeepSpeed ZeRO stage: 0 none, 1 optimizer state, 2 and gradients, 3 and parameters are partitioned."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto is bf16 autocast on GPUs that have it, else fp32. Masters are fp32."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples an optimizer step, over all workers; must divide by workers × accumulation."""
    accumulation: Annotated[int, Gt(0)] = 1
    """Micro-batches a worker an optimizer step."""
    epochs: Annotated[int, Gt(0)] = 3
    """Passes over the training set."""
    max_steps: Annotated[int, Gt(0)] | None = None
    """Stop after this many optimizer steps in all, even in mid-epoch."""
    validate_every: Annotated[int, Gt(0)] | None = None
    """Steps between validations within an epoch; there is always one at the end of each epoch."""
    checkpoint_every: Annotated[int, Gt(0)] | None = None
    """Steps between checkpoints beside those after each validation."""
    checkpoint_minutes: Annotated[float, Gt(0)] | None = 10.0
    """Minutes after which there is a checkpoint in any case."""
    keep_checkpoints: Annotated[int, Gt(0)] = 2
    """Newest checkpoints kept, beside the best one."""
    log_every: Annotated[int, Gt(0)] = 20
    """Steps between log lines and tracked points."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of initial weights, order, infilling and dropout."""
    resume: str = "auto"
    """auto goes on with the run of this name if there is one; never refuses an existing name; a checkpoint's URI
    starts from its whole state."""
    max_failures: Annotated[int, Ge(0)] = 8
    """How often the workers are started again, from the newest checkpoint, after one of them died."""
    audit: bool = False
    """Write which examples every step trained on, as Parquet under the run's audit folder."""
    init_from: str | None = None
    """Checkpoint URI whose weights the run starts from; optimizer and schedule start afresh."""
    mlflow: str | None = None
    """MLflow tracking URI; by default a sqlite file under the storage folder."""
    experiment: str = "arplus"
    """MLflow experiment."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    """The loss."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """The optimizer and its schedule."""
    feed: FeedConfig = field(default_factory=FeedConfig)
    """The batches."""

    @property
    def micro_batch_size(self) -> int:
        """Examples in one forward pass of one worker."""
        return self.batch_size // (self.workers * self.accumulation)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        share = self.workers * self.accumulation
        if self.batch_size % share:
            below, above = self.batch_size // share * share, -(-self.batch_size // share) * share
            sizes = f"{below} or {above} would do" if below else f"{above} would do"
            yield (
                "batch_size",
                f"must divide by workers × accumulation = {self.workers} × {self.accumulation}; "
                f"{sizes} (got {self.batch_size})",
            )


RESERVED_SPLITS = ("train", "valid", "test", "vocabulary", "rejects")
"""Names of folders in a prepared data set that no evaluation set can have."""


@dataclass(frozen=True, kw_only=True)
class PrepareConfig:
    """Turns raw records into an encoded data set."""

    input: str = ""
    """URI of a JSON-lines file (.jsonl, .json, .txt; plain, .gz or .zst) or of a folder of them."""
    output: str = ""
    """URI of the data set to make."""
    evaluation_set: tuple[str, ...] = ()
    """NAME=URI of further records (repeatable), such as the official random and biased test files: encoded with the
    training vocabularies as a split NAME, complete; sessions of the input with the same dialogue are in no split."""
    duplicate_key: Literal["exact_record", "dialogue_and_profiles", "dialogue"] = "dialogue_and_profiles"
    """What makes two records duplicates: the raw line; utterances, speakers and profiles; the utterances alone."""
    incomplete_personas: Literal["drop", "keep"] = "drop"
    """What to do with an example in which a speaker lacks gender or location."""
    max_reject_share: Annotated[float, Ge(0), Le(1)] = 0.02
    """Stop, with nothing committed, when more than this share of the records is rejected."""
    valid: Annotated[float, Ge(0)] = 20_000
    """Validation sessions: a share below 1, or a number; at most 5 % of the dialogues (by their hash)."""
    test: Annotated[float, Ge(0)] = 20_000
    """Test sessions: a share below 1, or a number; at most 5 % of the dialogues (by their hash)."""
    max_utterance_characters: Annotated[int, Gt(0)] = 15
    """Characters kept of an utterance."""
    max_context_utterances: Annotated[int, Gt(0)] = 7
    """Utterances kept of a context: three turns of two and the question."""
    min_character_count: Annotated[int, Gt(0)] = 5
    """Rarer characters of the training sessions become [UNK]."""
    min_persona_word_count: Annotated[int, Gt(0)] = 2
    """Rarer persona words of the training sessions become [UNK]."""
    max_characters: Annotated[int, Gt(0)] = 9_489
    """Most frequent characters kept, special tokens not counted."""
    max_persona_words: Annotated[int, Gt(0)] = 10_002
    """Most frequent persona words kept, the three keys included, special tokens not counted."""
    character_vocabulary: str | None = None
    """URI of a given character vocabulary (one token and its count a line) instead of one that is counted."""
    persona_vocabulary: str | None = None
    """URI of a given persona vocabulary instead of one that is counted."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.input:
            yield "input", "is required: the URI of a JSON-lines file or of a folder of them"
        if not self.output:
            yield "output", "is required: the URI of the data set to make"
        names = [item.partition("=")[0] for item in self.evaluation_set]
        for name, item in zip(names, self.evaluation_set, strict=True):
            if not item.partition("=")[2]:
                yield "evaluation_set", f"must be NAME=URI (got {item!r})"
            elif not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name) or name in RESERVED_SPLITS:
                yield (
                    "evaluation_set",
                    f"needs a name of letters, digits, - and _, none of {', '.join(RESERVED_SPLITS)} (got {name!r})",
                )
            elif names.count(name) > 1:
                yield "evaluation_set", f"names {name!r} twice"
        for name in ("valid", "test"):
            wanted = getattr(self, name)
            if wanted >= 1 and not float(wanted).is_integer():
                yield name, f"must be a share below 1 or a whole number of sessions (got {wanted})"


@dataclass(frozen=True, kw_only=True)
class SynthesizeConfig:
    """Writes generated records in PersonalDialog's raw form, with planted duplicates and broken lines."""

    output: str = ""
    """URI of a new folder of part files, or of one file that ends in .jsonl, .jsonl.gz or .jsonl.zst."""
    records: Annotated[int, Gt(0), Le(400_000_000)] = 10_000
    """Lines in all, duplicates and broken ones among them."""
    duplicates: Annotated[int, Ge(0)] = 0
    """Lines that repeat an earlier record: half of them exactly, the others with more white space."""
    broken: Annotated[int, Ge(0)] = 0
    """Lines that hold no valid record: truncated, of wrong types, not UTF-8, …"""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of everything; the same settings give the same bytes."""
    persona_answers: Annotated[float, Ge(0), Le(1)] = 0.0
    """Share of the exchanges in which one asks for place, gender or hobby and the reply answers from the responder's
    profile. Near zero in the real data (0 of 179 replies); turned up, it makes the use of personas measurable."""
    chatterbot: bool = False
    """Append the Chinese part of chatterbot-corpus (real text, random personas) to the records."""
    part_records: Annotated[int, Gt(0)] = 100_000
    """Lines a part file, when the output is a folder."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.output:
            yield "output", "is required: the URI of the folder or file to write"
        if self.duplicates + self.broken > self.records:
            yield (
                "records",
                f"counts all lines, so it must be at least duplicates + broken = {self.duplicates} + {self.broken} "
                f"(got {self.records})",
            )
        elif self.duplicates and self.duplicates + self.broken == self.records:
            yield "duplicates", f"leave no record to be repeated (records = {self.records}, broken = {self.broken})"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How replies are drawn: nucleus sampling (Holtzman et al. 2019). The defaults are the paper's."""

    temperature: Annotated[float, Ge(0)] = 0.7
    """Divides the logits; 0 takes the likeliest character each time (greedy)."""
    top_p: Annotated[float, Ge(0), Le(1)] = 0.9
    """Nucleus: the likeliest characters up to this probability, the first past it included; 0 keeps all."""
    top_k: Annotated[int, Ge(0)] = 0
    """Keep at most this many characters, before the nucleus is taken; 0 keeps all."""
    max_characters: Annotated[int, Gt(0)] = 15
    """Longest reply."""
    min_characters: Annotated[int, Ge(0)] = 1
    """Shortest reply: until then no special token, which would end it, can be drawn."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Computes the metrics of a checkpoint on one split of a prepared data set."""

    checkpoint: str = ""
    """URI of a checkpoint, or of a run's folder, which stands for its best one."""
    data: str = ""
    """URI of a prepared data set with the checkpoint's vocabularies."""
    split: str = "test"
    """Split of the data set."""
    json: str | None = None
    """URI of a JSON file to write the metrics to."""
    batch_size: Annotated[int, Gt(0)] = 64
    """Examples a batch; the paper-compatible metrics are means over batches, so they depend on it."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the replies."""
    mlflow: str | None = None
    """MLflow tracking URI; by default that of the training run, whose MLflow run takes the metrics."""
    sampling: Sampling = field(default_factory=Sampling)
    """The replies."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.checkpoint:
            yield "checkpoint", "is required: the URI of a run's folder or of one of its checkpoints"
        if not self.data:
            yield "data", "is required: the URI of a prepared data set"


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A conversation with a checkpoint under a chosen persona; with --say one reply."""

    checkpoint: str = ""
    """URI of a checkpoint, or of a run's folder, which stands for its best one."""
    gender: Literal["男", "女", "male", "female", ""] = ""
    """Gender of the model's persona; empty is unknown."""
    location: str = ""
    """Place of the model's persona, as in "四川 成都"; empty is unknown."""
    tags: str = ""
    """Interests of the model's persona, joined by ";"."""
    say: str | None = None
    """Answer this utterance and stop; without it, a conversation on the terminal."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of the replies."""
    sampling: Sampling = field(default_factory=Sampling)
    """The replies."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.checkpoint:
            yield "checkpoint", "is required: the URI of a run's folder or of one of its checkpoints"


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writes a model for others: a checkpoint without its optimizer state, or the paper code's weights in our form."""

    checkpoint: str | None = None
    """URI of a checkpoint, or of a run's folder, which stands for its best one."""
    from_reference: str | None = None
    """URI of a state_dict of the paper's code (torch.save or .safetensors) instead."""
    output: str = ""
    """URI of the folder to write."""
    preset: str = "arplus"
    """With --from-reference: the row that the weights are of."""
    layers: Annotated[int, Gt(0)] | None = None
    """With --from-reference: layers applied, where they are shared and not the preset's number."""
    heads: Annotated[int, Gt(0)] | None = None
    """With --from-reference: attention heads, where not the preset's number."""
    character_vocabulary: str | None = None
    """With --from-reference: URI of the characters (one token and its count a line) that the weights were made for."""
    persona_vocabulary: str | None = None
    """With --from-reference: URI of the persona words that the weights were made for."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not self.output:
            yield "output", "is required: the URI of the folder to write"
        if (self.checkpoint is None) == (self.from_reference is None):
            yield "checkpoint", "or --from-reference is required, and only one of them"
        if self.from_reference is not None:
            for name in ("character_vocabulary", "persona_vocabulary"):
                if getattr(self, name) is None:
                    yield name, "is required with --from-reference"


AR = ModelConfig(
    groups=1,
    embedding_size=512,
    ff_bottleneck=None,
    rezero=False,
    memory_hops=0,
    auxiliary="lm",
    tied_generator=True,
    decoder_norm=False,
)
"""The baseline, AR (Zheng et al. 2019 without the weight predictor: a = 1, Eq. 2)."""

_LOW_LR = 1.5e-4
"""The rate at which the paper's code trained AR and four of the five ablations; its schedule's floor, so constant."""


def _row(preset: str, model: ModelConfig, lr: float) -> TrainConfig:
    return TrainConfig(preset=preset, model=model, optimizer=OptimizerConfig(lr=lr))


PRESETS: dict[str, TrainConfig] = {
    row.preset: row
    for row in (
        replace(_row("ar", AR, _LOW_LR), optimizer=OptimizerConfig(lr=_LOW_LR, eps=1e-8)),
        _row("arplus", ModelConfig(), 2e-3),
        _row("no-rezero", ModelConfig(rezero=False), _LOW_LR),
        _row("no-albert", ModelConfig(groups=1, embedding_size=512), 2e-3),
        _row("no-factor-ff", ModelConfig(ff_bottleneck=None), _LOW_LR),
        _row("no-memn2n", ModelConfig(memory_hops=0), _LOW_LR),
        _row("no-bart-mlm", ModelConfig(auxiliary="lm"), _LOW_LR),
    )
}
"""The paper's rows by name, with the learning rate that the paper's code used for each (guide: Sizes)."""


def preset(name: str) -> TrainConfig:
    """The configuration of one of the paper's rows. Raises :class:`UserError` for an unknown name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name]


def tiny(config: TrainConfig) -> TrainConfig:
    """Shrinks any preset to seconds of training on a CPU; what makes the row the row stays."""
    model = config.model
    d_model = 128
    return replace(
        config,
        model=replace(
            model,
            layers=2,
            groups=2 if model.unique_layers == 1 else 1,
            d_model=d_model,
            embedding_size=d_model if model.embedding_size == model.d_model else 64,
            heads=4,
            ff_size=256,
            ff_bottleneck=None if model.ff_bottleneck is None else 32,
        ),
        # Small batches are noisy: the paper's patience would halve the rate before a short run has learnt anything.
        optimizer=replace(config.optimizer, lr=2e-3, plateau_patience=1000),
        batch_size=32,
        feed=replace(config.feed, window_batches=64),
    )


# ---------------------------------------------------------------------------------------- dictionaries and checking


T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Builds and checks a configuration from plain values, as :func:`to_dict` gives them; missing keys take defaults.

    Raises :class:`UserError` naming ``source``, the flag and the problem; for an unknown key it lists the valid ones.
    """
    valid = list(dotted_names(cls))
    for key in _leaves(values):
        if key not in valid and not any(name.startswith(key + ".") for name in valid):
            raise UserError(f"{source}: {unknown_key(key, valid)}")
    try:
        config = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        problems = [(_location(e["loc"], valid), f"{_lower(e['msg'])} (got {e['input']!r})") for e in error.errors()]
    else:
        problems = list(_check(config))
    if problems:
        raise UserError("; ".join(dict.fromkeys(f"{source}: --{flag(name)}: {problem}" for name, problem in problems)))
    return config


def checked(config: T, *, source: str = "command line") -> T:
    """The same configuration, after every check of :func:`from_dict`."""
    return from_dict(type(config), to_dict(config), source=source)


def dotted_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Names of all settings below the dataclass ``cls``, as in ``optimizer.lr``."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from dotted_names(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def flat(config: Any) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in dotted_names(type(config))}


def flag(name: str) -> str:
    """A setting's dotted name as it is written on the command line."""
    return name.replace("_", "-")


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that is none of ``valid``, nearest name first."""
    near = difflib.get_close_matches(key, valid, n=1)
    return f"unknown key {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}; valid keys: {', '.join(valid)}"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _location(loc: tuple[int | str, ...], valid: list[str]) -> str:
    """The setting a pydantic error is about: the longest start of its location that is one (unions add type names)."""
    names = [".".join(map(str, loc[:n])) for n in range(len(loc), 0, -1)]
    return next((name for name in names if name in valid), names[0])


def _check(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, f.name)):
            yield from _check(value, f"{prefix}{f.name}.")
        elif isinstance(value, float) and not math.isfinite(value):  # JSON, so a run's config.json, has no infinity
            yield prefix + f.name, f"must be finite (got {value})"
    if hasattr(config, "check"):
        yield from ((prefix + name, problem) for name, problem in config.check())


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
