"""The model family: AR+, its five ablations and AR, as one network (paper, section Model).

The parts, each in a file of its own:
    embedding   √E · character + speaker's persona + position → d
    features    hidden states of a pretrained model instead of characters or encoder, or beside characters
    memory      MemN2N: the persona's words answer the context; o is added to every context position
    layers      Eq. 5 with ReZero, or norms; shared by encoder and decoder (or not), applied again and again (ALBERT)
    attention   the routes O_T, O_C and O_prev of Eq. 2
    predictor   a of Eq. 1, if wanted: O_T counts a times, O_C 2 - a times
    objective   L_D, L_LM and L_W of Eq. 3 and 4 as sums

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
from arplus.model.layers import Adapter, FactoredFeedForward, Layer, PostNormLayer, ReZeroLayer, Stack
from arplus.model.memory import LayerWiseMemory, PersonaMemory
from arplus.model.objective import Losses, OutputHead, weight_sums
from arplus.model.predictor import WeightPredictor

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
        self.predictor = WeightPredictor(config, sizes) if config.persona_weight == "predicted" else None
        self.persona_weight: float | None = None
        """a of every reply, where neither 1 nor what is predicted is wanted."""

        self._initialise()
        if config.tied_head:
            self.head.weight = self.characters.weight
        self.frozen: FrozenModel | None = None
        """The pretrained model that the features are of, to be set by whoever has loaded it."""

    def forward(self, batch: Batch) -> Losses:
        """L_D and L_LM of the batch as sums over its targets, ``len(batch.target_N)``; L_W over its examples."""
        hidden_GND, z_B = self.hidden_and_weigh(batch)
        dialogue, auxiliary = self.head(hidden_GND, batch.target_N)
        if z_B is None:
            return Losses(dialogue, auxiliary)
        assert batch.persona_related_B is not None, "what predicts is told what to predict"
        return Losses(dialogue, auxiliary, *weight_sums(z_B, batch.persona_related_B))

    def hidden_and_weigh(self, batch: Batch) -> tuple[Tensor, Tensor | None]:
        """What the head is given for L_D and for L_LM, (2, N, D), and z (B,), as :meth:`encode_and_weigh` gives it."""
        auxiliary = [self.encode_infilled(batch.infilled)] if batch.infilled is not None else []
        dialogue, z_B = self.encode_and_weigh(batch)
        return torch.stack([self.decode(batch.response, memories) for memories in (dialogue, auxiliary)]), z_B

    # ------------------------------------------------------------------------------------------------------ encoding

    def encode(self, batch: Batch) -> list[Encoded]:
        """What a reply attends to: the encoded context (O_C) and, without a MemN2N memory, the persona (O_T)."""
        return self.encode_and_weigh(batch)[0]

    def encode_and_weigh(self, batch: Batch) -> tuple[list[Encoded], Tensor | None]:
        """The same, and z (B,) of the predicted weights a = σ(z); None where none is predicted.

        Eq. 1: a·O_T + (2 - a)·O_C + O_prev, with a predicted from E_C. With a MemN2N memory, whose answer E_C holds, o
        counts a times instead of O_T, and a is predicted from what the encoder is given: ours, not the paper's.
        """
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
            z_B, a_B = self._weigh(x_ND, batch.context)
            o_BD = o_BD if a_B is None else a_B[:, None] * o_BD
            encoded_ND = self._encode(x_ND + contexts.spread(o_BD).to(x_ND.dtype), contexts)
            return [self._key_value(encoded_ND, contexts, None if a_B is None else 2 - a_B)], z_B
        personas = batch.persona.sequences
        persona_ND = self.persona_input(self.characters(batch.persona.ids), personas)
        encoded_ND = self._encode(x_ND, contexts)
        z_B, a_B = self._weigh(encoded_ND, batch.context)
        o_c = self._key_value(encoded_ND, contexts, None if a_B is None else 2 - a_B)
        return [o_c, self._key_value(self._encode(persona_ND, personas), personas, a_B)], z_B

    def encode_infilled(self, infilled: Packed) -> Encoded:
        """What the auxiliary decoder attends to: the response with a span replaced by [MASK] (Lewis et al. 2019)."""
        if self.config.features_for == "encoder":
            return self._key_value(self._features(infilled), infilled.sequences)
        of = infilled.sequences
        return self._key_value(self._encode(self.auxiliary_input(self._vectors(infilled), of), of), of)

    def _weigh(self, x_ND: Tensor, context: Packed) -> tuple[Tensor | None, Tensor | None]:
        """What is predicted of each example, z, and what is weighed by, a; (B,), as far as there are any."""
        z_B = None if self.predictor is None else self.predictor(x_ND, context)
        if self.persona_weight is not None:
            return z_B, torch.full((len(context.sequences),), self.persona_weight, device=x_ND.device)
        return z_B, None if z_B is None else z_B.sigmoid()

    def _encode(self, x_ND: Tensor, of: Sequences) -> Tensor:
        if self.config.features_for != "encoder":
            for layer in self._applications(self.layers if self.config.shared_stacks else self.encoder_layers):
                x_ND = layer.encode(x_ND, of)
        return x_ND

    def _key_value(self, x_ND: Tensor, of: Sequences, weight_B: Tensor | None = None) -> Encoded:
        # Once per unique layer, not per application: shared layers see the same memory with the same weights.
        return [layer.attention.key_value(x_ND, of, weight_B) for layer in self._unique(self.layers)]

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

    def fold(self) -> None:
        """Has every factored feed-forward folded: for replies, which know no dropout, and not for training."""
        for module in self.modules():
            if isinstance(module, FactoredFeedForward):
                module.fold()

    def _unique(self, layers: nn.ModuleList) -> Iterator[Layer]:
        for layer in layers:
            assert isinstance(layer, Layer)
            yield layer

    def _applications(self, layers: nn.ModuleList) -> Iterator[Layer]:
        """The unique layers in order, and again, ``repeats`` times: one layer in six repeats is applied six times."""
        for _ in range(self.config.repeats):
            yield from self._unique(layers)

    def _initialise(self) -> None:
        """Xavier uniform for every matrix, tables too; biases and norms as torch leaves them.

        Attention and adapters have an initialisation of their own.
        """
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, Attention | Adapter):
                module.reset_parameters()
