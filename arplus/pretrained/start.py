"""What the weights of a new run start from, where not at random (``--init``)."""

from dataclasses import replace

from arplus import storage
from arplus.config import InitConfig
from arplus.model.network import PersonaTransformer
from arplus.pretrained import models, vectors, weights
from arplus.text import Vocabulary


def resolve(init: InitConfig, before: InitConfig | None = None) -> InitConfig:
    """The settings with their paths, and the digest of the pretrained weights, filled in.

    A run that was there ``before`` with the same path keeps its digest, and the model is not looked at again.
    """
    file, path = init.character_vectors, init.pretrained
    init = replace(init, character_vectors=file and storage.absolute(file))
    if path is None:
        return init
    path = models.absolute(path)
    known = before.digest if before is not None and before.pretrained == path else None
    return replace(init, pretrained=path, digest=known or models.digest(path, weights.FLAG))


def initialise(model: PersonaTransformer, characters: Vocabulary, init: InitConfig) -> list[str]:
    """Sets what ``init`` names: another model's weights, then the characters' vectors. What was done, in lines.

    Raises :class:`UsageError` where something does not fit ``model``, which may be on the "meta" device.
    """
    said = []
    if init.pretrained is not None:
        said.append(weights.initialise(model, characters, init))
    if init.character_vectors is not None:
        said.append(vectors.initialise(model, characters, init.character_vectors))
    return said
