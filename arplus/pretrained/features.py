"""A pretrained model that makes features for ours (``--model.features.path``): frozen, in evaluation mode, outside it.

Sequences are padded here, as its attention wants them, and each begins with its [CLS], whose own state is left out.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from arplus.config import ExampleRules, ModelConfig
from arplus.errors import UsageError
from arplus.model.batch import Packed
from arplus.model.network import PersonaTransformer
from arplus.pretrained import models
from arplus.text import Vocabulary

FLAG = "model.features.path"


def resolved(config: ModelConfig, before: ModelConfig | None = None) -> ModelConfig:
    """The settings with the model's full path, its width and the digest of its weights filled in.

    Raises :class:`UsageError` where a run that was there ``before`` had other weights under this path.
    """
    features = config.features
    if features.path is None:
        return config
    path = models.absolute(features.path)
    same = before is not None and before.features.path == path
    width, digest = models.width(path, FLAG, before.features.digest if before and same else features.digest)
    return replace(config, features=replace(features, path=path, width=width, digest=digest))


def attach(model: PersonaTransformer, characters: Vocabulary, rules: ExampleRules) -> PersonaTransformer:
    """The network with the pretrained model that its features are of, if they are.

    Raises :class:`UsageError` where that model is not what it was, knows too few of the characters, or has no such
    layer or fewer positions than a context; see also :func:`models.load`.
    """
    features = model.config.features
    if features.path is not None:
        source = models.load(features.path, FLAG, features.digest)
        model.frozen = FrozenFeatures(source, characters, features.layer_indices)
        model.frozen.check(characters, rules, f"--{FLAG} {features.path}")
    return model


def frozen_parameters(config: ModelConfig) -> int:
    """Parameters of the pretrained model that features are of, which every worker holds beside the network's; or 0."""
    if config.features.path is None:
        return 0
    network = models.load(config.features.path, FLAG, config.features.digest).network
    return sum(p.numel() for name, p in network.named_parameters() if not name.startswith("pooler."))


class FrozenFeatures:
    """See :class:`arplus.model.features.FrozenModel`. It follows its inputs from device to device."""

    def __init__(self, source: models.Pretrained, characters: Vocabulary, layers: list[int]) -> None:
        self.network, self.layers = source.network.requires_grad_(False), layers
        self.found = models.their_ids(characters, source.vocabulary)
        unknown = self.found[characters.special.unk] or 0
        self.theirs_V = torch.tensor([unknown if i is None else i for i in self.found])
        self.first = self.found[characters.special.bos]
        # Not decorators, which would import the compiler, for a second, into all that reads a checkpoint.
        self.contextual = torch.compiler.disable(self._contextual)
        self.pointwise = torch.compiler.disable(self._pointwise)

    def check(self, characters: Vocabulary, rules: ExampleRules, what: str) -> None:
        """Raises :class:`UsageError`, about ``what``, for a model that cannot serve."""
        config = self.network.config
        share, there = models.coverage(characters, self.found), config.num_hidden_layers
        if share < models.LEAST_COVERAGE or self.first is None:
            raise UsageError(
                f"{what}: its vocabulary knows {share:.0%} of the text's characters, less than "
                f"{models.LEAST_COVERAGE:.0%}, or no [CLS]; take a model of Chinese"
            )
        if wrong := [i for i in self.layers if not -there - 1 <= i <= there]:
            raise UsageError(f"--model.features.layers: {wrong[0]} is not a layer of {there} and the embeddings, 0")
        positions = getattr(config, "max_position_embeddings", -1)  # which is XLNet's, for any number
        if 0 <= positions <= rules.max_context_ids:
            raise UsageError(
                f"{what}: has {positions} positions, and the data's contexts are up to {rules.max_context_ids} "
                "characters and a [CLS] long; prepare the data with fewer"
            )

    @torch.no_grad()
    def _contextual(self, packed: Packed) -> list[Tensor]:
        """The hidden states of the chosen layers, (N, H) each."""
        of, ids, config = packed.sequences, self._theirs(packed.ids), self.network.config
        states: list[list[Tensor]] = [[] for _ in self.layers]
        lengths = of.lengths.split([block.sequences for block in of.blocks])
        for ids_BS, length_B in zip(of.pad(ids), lengths, strict=True):
            ids_BS = functional.pad(ids_BS, (1, 0), value=self.first)
            mask_BS = torch.arange(ids_BS.shape[1], device=ids.device) <= length_B[:, None]
            if not len(ids_BS):  # a block of no sequences, which transformers cannot lay out
                for state in states:
                    state.append(ids_BS.new_zeros(0, ids_BS.shape[1] - 1, config.hidden_size, dtype=torch.float32))
                continue
            found = self.network(input_ids=ids_BS, attention_mask=mask_BS.long(), output_hidden_states=True)
            for state, i in zip(states, self.layers, strict=True):
                state.append(found.hidden_states[i][:, 1:])
        return [of.pack(state) for state in states]

    @torch.no_grad()
    def _pointwise(self, packed: Packed, start: int) -> Tensor:
        """The embeddings alone, (N, H)."""
        ids, network = self._theirs(packed.ids)[None], self.network
        if network.config.model_type == "xlnet":
            found: Tensor = network.word_embedding(ids)
            return found[0]
        # Its positions begin with the [CLS].
        x = network.embeddings(input_ids=ids, position_ids=packed.sequences.position_N[None] + start + 1)
        projection = getattr(network, "embeddings_project", None)
        if network.config.model_type == "albert":
            projection = network.encoder.embedding_hidden_mapping_in
        return (x if projection is None else projection(x))[0]

    def _theirs(self, ids_N: Tensor) -> Tensor:
        if self.theirs_V.device != ids_N.device:
            self.theirs_V, self.network = self.theirs_V.to(ids_N.device), self.network.to(ids_N.device)
        return self.theirs_V[ids_N.long()]
