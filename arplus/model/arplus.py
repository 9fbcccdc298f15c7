"""The model family: AR+, its five ablations and AR, as one network (paper, section Model).

The parts, each in a file of its own:
    embedding   √E · character + speaker's persona + position → d
    memory      MemN2N: the persona's words answer the context; o is added to every context position
    layers      Eq. 5 with ReZero, or norms; shared by encoder and decoder, applied again and again (ALBERT)
    attention   the routes O_T, O_C and O_prev of Eq. 2
    objective   L_D and L_LM of Eq. 4 as sums and counts

DeepSpeed's ZeRO-3 gathers a module's parameters only while its forward runs, so nothing here reads a parameter from
outside its module. No branch depends on what is in a batch: every parameter takes part in every step.

Shape suffixes are those of :mod:`arplus.model.batch`.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from arplus.config import ModelConfig, VocabularySizes, special_ids
from arplus.errors import UserError
from arplus.model.attention import Attention, KeyValue
from arplus.model.batch import Batch
from arplus.model.embedding import SequenceInput, masked_sum, speaker_personas
from arplus.model.layers import Layer, PostNormLayer, ReZeroLayer
from arplus.model.memory import PersonaMemory
from arplus.model.objective import Generator, Losses, real_targets

Memory = list[KeyValue]
"""An encoded sequence as the decoder needs it: its keys and values, one entry a unique layer."""

_SHAPES = 64
"""Most variants of a layer's pass that are compiled: seven widths of contexts and one of responses, in training and in
validation, for each kind of memory. Past it torch goes on uncompiled."""

Cache = list[KeyValue | None]
"""Keys and values of the response so far, one entry an application of a layer."""


class ARPlus(nn.Module):
    """A persona-aware dialogue model. Calling it on a batch gives the :class:`Losses`; that is all training needs."""

    def __init__(self, config: ModelConfig, sizes: VocabularySizes) -> None:
        super().__init__()
        self.config, self.sizes = config, sizes
        self.pad = special_ids(sizes.characters).pad
        self.persona_pad = special_ids(sizes.persona_words).pad if config.memory_hops else self.pad

        self.characters = nn.Embedding(sizes.characters, config.embedding_size)
        self.context_input = SequenceInput(config)
        if config.memory_hops:
            self.persona_words = nn.Embedding(sizes.persona_words, config.embedding_size)
            self.memory = PersonaMemory(config, sizes)
        else:
            self.persona_input = SequenceInput(config, positions=False)
        if config.memory_hops or config.auxiliary == "infilling":
            self.auxiliary_input = SequenceInput(config)
        self.response_input = SequenceInput(config)
        layer = ReZeroLayer if config.rezero else PostNormLayer
        self.layers = nn.ModuleList(layer(config) for _ in range(config.unique_layers))
        self.generator = Generator(config.d_model, sizes.characters, bias=False)

        self._initialise()
        if config.tied_generator:
            self.generator.weight = self.characters.weight

    def forward(self, batch: Batch) -> Losses:
        """L_D and L_LM of the batch as sums over the real targets of its counted rows, and their counts."""
        hidden_GND, _, target_N = self.at_targets(batch)
        dialogue, auxiliary = self.generator(hidden_GND, target_N)
        count = torch.full_like(dialogue, target_N.numel())
        return Losses(dialogue, count, auxiliary, count.clone())

    def at_targets(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """What the generator is given for both losses, (2, N, D), and where and what the N real targets are.

        The last two are those of :func:`~arplus.model.objective.real_targets`. Logits are needed, and computed, at real
        targets only: a third of AR+'s work otherwise.
        """
        # First of all, since it waits for the GPU, which has nothing to do yet.
        index_N, target_N = real_targets(batch.response_BT, batch.counted_B, self.pad)
        memories = self.encode(batch)
        infilled: list[Memory] = []
        if self.config.auxiliary == "infilling":
            assert batch.infilled_BU is not None, "a batch for the infilling task holds infilled responses"
            infilled = [self.encode_infilled(batch.infilled_BU)]
        ids_BT = batch.response_BT[:, :-1]
        hidden_ND = [self.decode(ids_BT, m).flatten(0, 1).index_select(0, index_N) for m in (memories, infilled)]
        return torch.stack(hidden_ND), index_N, target_N

    # ------------------------------------------------------------------------------------------------------ encoding

    def encode(self, batch: Batch) -> list[Memory]:
        """What a reply attends to: the encoded context (O_C) and, without a MemN2N memory, the persona (O_T)."""
        real_BS = batch.context_BS != self.pad
        real_BK = batch.target_persona_BK != self.persona_pad
        vectors_BSE = self.characters(batch.context_BS)
        words = self.persona_words if self.config.memory_hops else self.characters
        profiles_BPE = masked_sum(words(batch.profiles_BPW), batch.profiles_BPW != self.persona_pad)
        x_BSD = self.context_input(vectors_BSE, speaker_personas(profiles_BPE, batch.context_profile_BS))
        if self.config.memory_hops:
            # The memory's query is the whole context less its last [SEP].
            query_BSD, length_B = self.auxiliary_input(vectors_BSE), real_BS.sum(1) - 1
            o_BD = self.memory(batch.target_persona_BK, real_BK, query_BSD, length_B)
            return [self._encode(x_BSD + o_BD[:, None].to(x_BSD.dtype), real_BS)]
        persona_BKD = self.persona_input(self.characters(batch.target_persona_BK))
        return [self._encode(x_BSD, real_BS), self._encode(persona_BKD, real_BK)]

    def encode_infilled(self, infilled_BU: Tensor) -> Memory:
        """What the auxiliary decoder attends to: the response with a span replaced by [MASK] (Lewis et al. 2019)."""
        return self._encode(self.auxiliary_input(self.characters(infilled_BU)), infilled_BU != self.pad)

    def _encode(self, x_BSD: Tensor, real_BS: Tensor) -> Memory:
        for layer in self._applications():
            x_BSD = layer.encode(x_BSD, real_BS)
        # Once a unique layer, not once an application: shared layers see the same memory with the same weights.
        return [layer.attention.memory(x_BSD, real_BS) for layer in self._unique()]

    # ------------------------------------------------------------------------------------------------------ decoding

    def decode(self, ids_BT: Tensor, memories: Sequence[Memory], cache: Cache | None = None) -> Tensor:
        """Hidden states (B, T, D) after each id, to be given to the generator.

        With a cache, ``ids_BT`` is the one id (T = 1) that follows what the cache holds, and the cache is extended.
        """
        start = cache[0].key_BHSC.shape[2] if cache and cache[0] else 0
        x_BTD = self.response_input(self.characters(ids_BT), start=start)
        for i, layer in enumerate(self._applications()):
            unique = i % self.config.unique_layers
            x_BTD, own = layer.decode(x_BTD, [memory[unique] for memory in memories], cache[i] if cache else None)
            if cache:
                cache[i] = own
        return x_BTD

    def new_cache(self) -> Cache:
        """An empty cache for :meth:`decode`."""
        return [None] * self.config.layers

    def folded(self) -> Self:
        """A twin for generation: the same parameters, and feed-forwards :func:`~arplus.model.layers.folded` from them.

        For evaluation alone and as long as the weights stay, so it is made anew for every batch of replies. It needs
        whole parameters, so not ZeRO-3's.
        """
        twin = copy.copy(self)
        twin._modules = self._modules | {"layers": nn.ModuleList(layer.folded() for layer in self._unique())}
        return twin

    def compile_layers(self) -> None:
        """Has torch.compile make kernels of the layers, for every shape of batches anew, so there should be few shapes.

        For training on a GPU. The layers alone: they are applied 24 times a step, and shared ones are compiled once.
        On a CPU a step took 1.2 to 1.5 times as long with it as with our own kernels.
        """
        for layer in self._unique():
            for name in ("encode", "decode"):
                # (The overloads that mypy sees lack the limit, which is 8 by default.)
                compiled = cast(Any, torch.compile)(getattr(layer, name), dynamic=False, recompile_limit=_SHAPES)
                setattr(layer, name, compiled)

    # ---------------------------------------------------------------------------------------------------- parameters

    def weights(self) -> dict[str, Tensor]:
        """Every parameter by name, a shared one once: unlike the state_dict, which lists AR's tied matrix twice."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Sets what :meth:`weights` gave. Raises :class:`UserError` where they are those of another model."""
        own = {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}
        given = {name: tuple(value.shape) for name, value in weights.items()}
        if given != own:
            wrong = sorted(name for name in own.keys() | given.keys() if own.get(name) != given.get(name))
            raise UserError(
                f"weights of another model: {len(wrong)} of {len(own)} parameters differ in name or shape, "
                f"{wrong[0]} for one"
            )
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.copy_(weights[name])

    def _unique(self) -> Iterator[Layer]:
        for layer in self.layers:
            assert isinstance(layer, Layer)
            yield layer

    def _applications(self) -> Iterator[Layer]:
        """The unique layers in order, and again, ``groups`` times: six layers in six groups are one layer six times."""
        for _ in range(self.config.groups):
            yield from self._unique()

    def _initialise(self) -> None:
        """Xavier uniform for every matrix, tables too; biases and norms as torch leaves them, attention as torch's."""
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, Attention):
                module.reset_parameters()
