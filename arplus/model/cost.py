"""A model's components: their live parameters, which of them are trained, and the arithmetic of a training step."""

from collections import Counter, defaultdict
from collections.abc import Collection
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from arplus.config import ModelConfig, VocabularySizes
from arplus.errors import UsageError
from arplus.model.network import PersonaTransformer

_COMPONENTS = (
    ("adapter.", "adapters"),
    ("feature", "features"),
    ("predictor.", "predictor"),
    ("characters.", "character table"),
    ("persona_words.", "persona table"),
    ("_input.projection.", "projections"),
    ("memory.", "memory"),
    (".attention.", "attention"),
    (".feed_forward.", "feed-forward"),
    ("norm", "norms and gates"),
    (".r", "norms and gates"),
    ("head.", "output head"),
)
"""What a parameter's name contains, and the component that it then belongs to."""
ADDED_LATER = ("adapters", "predictor")
"""Components with which a network may go on from the weights of one that lacks them."""


def outline(config: ModelConfig, sizes: VocabularySizes, only: Collection[str] = ()) -> PersonaTransformer:
    """A network whose parameters have shapes alone, on torch's "meta" device: it takes no memory and no time.

    ``only`` and the error as of :func:`train_only`.
    """
    with torch.device("meta"), _Unset():
        model = PersonaTransformer(config, sizes)
    train_only(model, only)
    return model


class _Unset(TorchFunctionMode):
    """Leaves parameters without values: to draw some that are nowhere torch would import its compiler, for a second."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Does what a function does, but for those that initialise a tensor."""
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def component_of(parameter: str) -> str:
    """The component that a parameter of this name belongs to."""
    return next(component for part, component in _COMPONENTS if part in parameter)


def live_parameters(model: PersonaTransformer) -> dict[str, int]:
    """Parameters of each component; a shared tensor counts once, where it first appears. There are no dead ones.

    Under ZeRO-3 count before the engine partitions them; a model on the "meta" device does.
    """
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[component_of(name)] += parameter.numel()
    return dict(counts)


def train_only(model: PersonaTransformer, components: Collection[str]) -> None:
    """Freezes all parameters but those of these components; where there are none, all are trained.

    Raises :class:`UsageError` for a component that the model does not have.
    """
    own = live_parameters(model)
    if unknown := [name for name in components if name not in own]:
        raise UsageError(f"--optimizer.only: this model has no component {unknown[0]!r}; it has {', '.join(own)}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not components or component_of(name) in components)


def forward_backward_flops(
    config: ModelConfig,
    sizes: VocabularySizes,
    *,
    context: float = 33.6,
    targets: float = 11.4,
    persona: float | None = None,
    only: Collection[str] = (),
) -> float:
    """Float operations of one example's forward and backward pass, real tokens only; a multiply-add is two.

    The lengths are those of an average PersonalDialog example: context characters with their [SEP], targets with
    [EOS], and the target persona (by default 8 words with a memory, 20 characters without). Counted are the matrix
    products of the algorithm in this package; the backward pass takes twice the forward, and once where the matrix is
    frozen (``only`` as in :func:`train_only`). Norms, softmax, look-ups and the memory's few vectors are left out
    (together under 2 %), and so are pretrained features.
    """
    d, wide, r, layers = config.d_model, config.ff_size, config.ff_bottleneck, config.layers
    if persona is None:
        persona = 8 if config.memory_hops else 20
    infilled = [targets] if config.auxiliary == "infilling" else []  # the response with [BOS], a span two to one
    memories = [context] if config.memory_hops else [context, persona]

    ff = 2 * d * wide if r is None else 2 * (d * r + r * wide)
    adapters = 2 * 2 * d * (config.adapter or 0)
    multiplied: dict[str, float] = defaultdict(float)  # by component; two multiplied activations are never frozen
    for n in memories + infilled:
        multiplied["attention"] += n * config.unique_layers * 2 * d * d  # keys and values
    for n in [] if config.features_for == "encoder" else memories + infilled:
        multiplied["attention"] += n * layers * 4 * d * d
        multiplied["feed-forward"] += n * layers * ff
        multiplied["adapters"] += n * layers * adapters
        multiplied["activations"] += n * layers * 2 * n * d
    for attended in (memories, infilled):
        projections = 5 if config.rezero and attended else 4  # Eq. 5 needs O_C apart from O_merge
        multiplied["attention"] += targets * layers * projections * d * d
        multiplied["feed-forward"] += targets * layers * ff
        multiplied["adapters"] += targets * layers * adapters
        multiplied["activations"] += targets * layers * 2 * (targets / 2 + sum(attended)) * d
    if config.embedding_size != d:
        projected = context * (2 if config.memory_hops else 1) + 2 * targets + sum(infilled) + sum(memories[1:])
        multiplied["projections"] += projected * config.embedding_size * d
    multiplied["character table" if config.tied_head else "output head"] += 2 * targets * d * sizes.characters
    frozen = sum(multiplied[name] for name in multiplied if only and name not in ("activations", *only))
    return 2 * (3 * sum(multiplied.values()) - frozen)
