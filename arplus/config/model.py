"""The network: its settings, its vocabularies' sizes and the special tokens."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal, NamedTuple

from annotated_types import Ge, Gt, Lt

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
class FeaturesConfig:
    """Hidden states of a pretrained model that stays as it is (extra ``pretrained``), for rows with a memory."""

    path: str | None = None
    """A frozen pretrained model whose hidden states become inputs, such as a BERT, ELECTRA, ALBERT or XLNet: the URI of
    a folder that transformers wrote, or a name on the model hub. It is not saved with the run: evaluation and chat
    need it too."""
    use: Literal["replace", "add", "encoder"] = "replace"
    """replace: in place of the character vectors. add: added to the vectors of what is encoded. encoder: in place of
    the encoder."""
    layers: str = "-2"
    """Hidden states to take, joined by commas. 0 is the embeddings, -1 the last layer."""
    combine: Literal["mean", "concat", "weighted"] = "mean"
    """How several layers become one: by their mean, side by side (concat), or weighted by a softmax of learnt
    weights."""
    width: Annotated[int | None, Gt(0)] = None
    """Its width, filled in when the run starts."""
    digest: str | None = None
    """SHA-256 of its weights, filled in when the run starts."""

    @property
    def layer_indices(self) -> list[int]:
        """The layers as numbers."""
        return [int(i) for i in self.layers.split(",")]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if not re.fullmatch("-?[0-9]{1,3}(,-?[0-9]{1,3})*", self.layers):
            yield "layers", f"must be numbers of layers, joined by commas (got {self.layers!r})"


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One member of the model family. The defaults are AR+; see :data:`PRESETS`."""

    layers: Annotated[int, Gt(0)] = 6
    """Layers applied in the encoder, and as many in the decoder."""
    repeats: Annotated[int, Gt(0)] = 6
    """How often the stack of unique layers is applied (ALBERT). layers / repeats layers have weights of their own."""
    d_model: Annotated[int, Gt(0)] = 512
    """Width d of the hidden states."""
    embedding_size: Annotated[int, Gt(0)] = 200
    """Width E of the embedding tables; projected to d where it differs (ALBERT)."""
    heads: Annotated[int, Gt(0)] = 8
    """Attention heads; must divide d."""
    ff_size: Annotated[int, Gt(0)] = 2048
    """Width of the feed-forward layer."""
    ff_bottleneck: Annotated[int | None, Gt(0)] = 100
    """Inner width of the factored feed-forward layer. None makes it the plain layer of two matrices."""
    activation: Literal["relu", "gelu", "gelu-tanh"] = "relu"
    """Activation of the plain feed-forward layer. BERT has gelu, ALBERT gelu-tanh."""
    rezero: bool = True
    """Gate each residual branch with one learnt scalar r (Eq. 5) instead of post-normalising."""
    gate_start: float = 0.0
    """The ReZero gate r at the start of training. At 0 (Bachlechner et al. 2020) all branches start closed, pretrained
    ones too."""
    shared_stacks: bool = True
    """Encoder and decoder share their layers. With False each has its own."""
    fixed_attention: Annotated[float, Ge(0)] = 0.1
    """b of Eq. 5: the share of O_T and O_C that bypasses the ReZero gate."""
    memory_hops: Annotated[int, Ge(0)] = 3
    """Hops of the MemN2N persona memory. With 0 there is no memory: the encoder reads the persona, and O_T exists."""
    memory_tying: Literal["adjacent", "layer-wise"] = "adjacent"
    """What the memory's hops share (Sukhbaatar et al. 2015). adjacent: a hop and the next one share a table.
    layer-wise: all hops share two tables and a linear map of the query."""
    auxiliary: Literal["infilling", "lm"] = "infilling"
    """The auxiliary task, whose loss is L_LM: infilling of the response as in BART, or its language modelling (lm)."""
    tied_head: bool = False
    """Use the character table as output matrix too, as AR does. Needs --model.embedding-size = --model.d-model."""
    decoder_norm: bool = True
    """Without ReZero: the decoder's first norm has weights of its own. In AR it shares the encoder's."""
    adapter: Annotated[int | None, Gt(0)] = None
    """Inner width of the two adapters of every unique layer (Houlsby et al. 2019), such as 64. None has no adapters."""
    dropout: Annotated[float, Ge(0), Lt(1)] = 0.1
    """Dropout on embeddings, attention weights and residual branches."""
    persona_weight: Literal["one", "predicted"] = "one"
    """The persona's weight in a reply (a of Eq. 1): always one, or predicted for each reply from its context. predicted
    needs the labels that jobs/prepare.py makes."""
    features: FeaturesConfig = field(default_factory=FeaturesConfig)
    """Hidden states of a frozen pretrained model as inputs."""

    @property
    def features_for(self) -> Literal["replace", "add", "encoder"] | None:
        """What pretrained features are used for, if they are."""
        return self.features.use if self.features.path is not None else None

    @property
    def unique_layers(self) -> int:
        """Layers with weights of their own."""
        return self.layers // self.repeats

    def loss_counts(self, targets: int, examples: int) -> list[int]:
        """What each of a batch's summed losses is divided by: L_D, L_LM and, where a is predicted, L_W and a."""
        return [targets, targets, *[examples] * (2 * (self.persona_weight == "predicted"))]

    def check(self) -> Iterator[tuple[str, str]]:
        """Yields (field, problem) for settings that are wrong together."""
        if self.layers % self.repeats:
            yield "repeats", f"must divide layers = {self.layers} (got {self.repeats})"
        if self.d_model % self.heads:
            yield "heads", f"must divide d_model = {self.d_model} (got {self.heads})"
        if self.tied_head and self.embedding_size != self.d_model:
            yield "embedding_size", f"must equal d_model = {self.d_model} when tied_head is on"
        if self.activation != "relu" and self.ff_bottleneck is not None:
            yield "activation", "is the plain feed-forward layer's: set ff_bottleneck to None, or leave it out"
        if self.features_for and not self.memory_hops:
            yield "features.path", "needs a row with a memory, whose personas have a table of their own"
        if self.features_for == "replace" and self.tied_head:
            yield "features.use", "replace leaves no character table, which tied_head needs"
        if self.features_for == "encoder" and not self.shared_stacks:
            yield "features.use", "encoder leaves nothing to the encoder's own layers: set shared_stacks to True"
        if self.gate_start and not self.rezero:
            yield "gate_start", "is the gate's of ReZero, which is off: leave it out or set rezero to True"
        if self.memory_tying != "adjacent" and not self.memory_hops:
            yield "memory_tying", "is the MemN2N memory's, which is off: leave it out or set memory_hops"
