"""The model family: AR+, its five ablations and AR, as one network (paper, section Model).

The parts, each in a file of its own:
    embedding   √E · character + speaker's persona + position → d
    features    hidden states of a pretrained model instead of characters or encoder, or beside characters
    memory      MemN2N: the persona's words answer the context; o is added to every context position
    layers      Eq. 5 with ReZero, or norms; shared by encoder and decoder (or not), applied again and again (ALBERT)
    attention   the routes O_T, O_C and O_prev of Eq. 2
    objective   L_D and L_LM of Eq. 4 as sums

DeepSpeed's ZeRO-3 gathers a module's parameters only while its forward runs, so nothing here reads a parameter from
outside its module. No branch depends on what is in a batch: every parameter takes part in every step.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from arplus.config import ModelConfig, VocabularySizes
from arplus.errors import UsageError
from arplus.model.attention import Attention, Blocks
from arplus.model.batch import Batch, Packed, Sequences
from arplus.model.embedding import SequenceInput
from arplus.model.features import FeatureInput, FrozenModel
from arplus.model.layers import Layer, PostNormLayer, ReZeroLayer, Stack
from arplus.model.memory import LayerWiseMemory, PersonaMemory
from arplus.model.objective import Losses, OutputHead

Encoded = list[Blocks]
"""Encoded sequences as the decoder needs them: their keys and values, one entry per unique layer."""

Cache = list[Blocks | None]
"""Keys and values of the responses so far, one entry per application of a layer."""


class PersonaTransformer(nn.Module):
    """A persona-aware dialogue model. Calling it on a batch gives the :class:`Losses`; that is all training needs."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes

        if config.features_for != "replace":
            self.characters = nn.Embedding(sizes.characters, config.embedding_size)
        if config.features_for:
            self.feature_input = FeatureInput(config, len(config.features.layer_indices))
        if config.features_for == "replace":
            self.response_features = FeatureInput(config, 1)
        self.context_input = SequenceInput(config)
        if config.memory_hops:
            self.persona_words = nn.Embedding(sizes.persona_words, config.embedding_size)
            memory = PersonaMemory if config.memory_tying == "adjacent" else LayerWiseMemory
            self.memory = memory(config, sizes)
        else:
            self.persona_input = SequenceInput(config, positions=False)
        if config.memory_hops or config.auxiliary == "infilling":
            self.auxiliary_input = SequenceInput(config)
        self.response_input = SequenceInput(config)
        layer = ReZeroLayer if config.rezero else PostNormLayer
        of: Stack = "both" if config.shared_stacks else "decoder"
        self.layers = nn.ModuleList(layer(config, of) for _ in range(config.unique_layers))
        if not config.shared_stacks:
            self.encoder_layers = nn.ModuleList(layer(config, "encoder") for _ in range(config.unique_layers))
        self.head = OutputHead(config.d_model, sizes.characters, bias=False)

        self._initialise()
        if config.tied_head:
            self.head.weight = self.characters.weight
        self.frozen: FrozenModel | None = None
        """The pretrained model that the features are of, to be set by whoever has loaded it."""

    def forward(self, batch: Batch) -> Losses:
        """L_D and L_LM of the batch as sums over its targets, of which there are ``len(batch.target_N)``."""
        return Losses(*self.head(self.hidden_at_targets(batch), batch.target_N))

    def hidden_at_targets(self, batch: Batch) -> Tensor:
        """What the head is given for L_D and for L_LM, (2, N, D)."""
        auxiliary = [self.encode_infilled(batch.infilled)] if batch.infilled is not None else []
        return torch.stack([self.decode(batch.response, memories) for memories in (self.encode(batch), auxiliary)])

    # ------------------------------------------------------------------------------------------------------ encoding

    def encode(self, batch: Batch) -> list[Encoded]:
        """What a reply attends to: the encoded context (O_C) and, without a MemN2N memory, the persona (O_T)."""
        contexts, vectors_NE = batch.context.sequences, self._vectors(batch.context)
        words = self.persona_words if self.config.memory_hops else self.characters
        profiles_PE = batch.profiles.sequences.sum(words(batch.profiles.ids))
        speaker_NE = functional.embedding(batch.speaker_N, profiles_PE)
        if self.config.features_for == "encoder":
            x_ND = self._features(batch.context) + self.context_input.projection(speaker_NE)
        else:
            x_ND = self.context_input(vectors_NE, contexts, speaker_NE)
        if self.config.memory_hops:
            o_BD = self.memory(batch.persona, self.auxiliary_input(vectors_NE, contexts), contexts)
            return [self._encode(x_ND + contexts.spread(o_BD).to(x_ND.dtype), contexts)]
        persona_ND = self.persona_input(self.characters(batch.persona.ids), batch.persona.sequences)
        return [self._encode(x_ND, contexts), self._encode(persona_ND, batch.persona.sequences)]

    def encode_infilled(self, infilled: Packed) -> Encoded:
        """What the auxiliary decoder attends to: the response with a span replaced by [MASK] (Lewis et al. 2019)."""
        if self.config.features_for == "encoder":
            return self._encode(self._features(infilled), infilled.sequences)
        return self._encode(self.auxiliary_input(self._vectors(infilled), infilled.sequences), infilled.sequences)

    def _encode(self, x_ND: Tensor, of: Sequences) -> Encoded:
        if self.config.features_for != "encoder":
            for layer in self._applications(self.layers if self.config.shared_stacks else self.encoder_layers):
                x_ND = layer.encode(x_ND, of)
        # Once per unique layer, not per application: shared layers see the same memory with the same weights.
        return [layer.attention.key_value(x_ND, of) for layer in self._unique(self.layers)]

    # ------------------------------------------------------------------------------------------------------ decoding

    def decode(
        self, response: Packed, memories: Sequence[Encoded], cache: Cache | None = None, start: int = 0
    ) -> Tensor:
        """Hidden states (N, D) after each id, to be given to the head.

        With a cache, ``response`` is one id per sequence, at position ``start``, and the cache is extended.
        """
        of = response.sequences
        x_ND = self.response_input(self._response_vectors(response, start), of, start=start)
        for i, layer in enumerate(self._applications(self.layers)):
            unique = i % self.config.unique_layers
            x_ND, own = layer.decode(x_ND, of, [memory[unique] for memory in memories], cache[i] if cache else None)
            if cache:
                cache[i] = own
        return x_ND

    def new_cache(self) -> Cache:
        """An empty cache for :meth:`decode`."""
        return [None] * self.config.layers

    # ---------------------------------------------------------------------------------------------------- characters

    def _vectors(self, packed: Packed) -> Tensor:
        """What stands for the characters of what is encoded, (N, E)."""
        use = self.config.features_for
        if use == "replace":
            return self._features(packed)
        vectors_NE = self.characters(packed.ids)
        return vectors_NE + self._features(packed) if use == "add" else vectors_NE

    def _response_vectors(self, response: Packed, start: int) -> Tensor:
        """What stands for those of the response, (N, E): each for itself, as hidden states would see what follows."""
        if self.config.features_for != "replace":
            return self.characters(response.ids)
        assert self.frozen is not None
        return self.response_features([self.frozen.pointwise(response, start)])

    def _features(self, packed: Packed) -> Tensor:
        assert self.frozen is not None
        return self.feature_input(self.frozen.contextual(packed))

    # ---------------------------------------------------------------------------------------------------- parameters

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name, a shared one once: unlike the state_dict, which lists AR's tied matrix twice."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Sets what :meth:`weights` gave. Raises :class:`UsageError` where they are those of another model."""
        own = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        if given != own:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise UsageError(
                f"weights of another model: {len(wrong)} of {len(own)} parameters differ in name or shape, "
                f"{wrong[0]} for one"
            )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])

    def _unique(self, layers: nn.ModuleList) -> Iterator[Layer]:
        for layer in layers:
            assert isinstance(layer, Layer)
            yield layer

    def _applications(self, layers: nn.ModuleList) -> Iterator[Layer]:
        """The unique layers in order, and again, ``repeats`` times: one layer in six repeats is applied six times."""
        for _ in range(self.config.repeats):
            yield from self._unique(layers)

    def _initialise(self) -> None:
        """Xavier uniform for every matrix, tables too; biases and norms as torch leaves them, attention as torch's."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, Attention):
                module.reset_parameters()
