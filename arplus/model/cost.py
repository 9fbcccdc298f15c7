"""What a model costs: its live parameters by component, and the arithmetic of a training step."""

from collections import Counter

from arplus.config import ModelConfig, VocabularySizes
from arplus.model.network import PersonaTransformer

_COMPONENTS = (
    ("feature", "features"),
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


def live_parameters(model: PersonaTransformer) -> dict[str, int]:
    """Parameters of each component; a shared tensor counts once, where it first appears. There are no dead ones.

    Under ZeRO-3 count before the engine partitions them; a model on the "meta" device does.
    """
    counts: Counter[str] = Counter()
    for name, parameter in model.named_parameters():
        counts[next(component for part, component in _COMPONENTS if part in name)] += parameter.numel()
    return dict(counts)


def forward_backward_flops(
    config: ModelConfig,
    sizes: VocabularySizes,
    *,
    context: float = 33.6,
    targets: float = 11.4,
    persona: float | None = None,
) -> float:
    """Float operations of one example's forward and backward pass, real tokens only; a multiply-add is two.

    The lengths are those of an average PersonalDialog example: context characters with their [SEP], targets with
    [EOS], and the target persona (by default 8 words with a memory, 20 characters without). Counted are the matrix
    products of the algorithm in this package; the backward pass takes twice the forward. Norms, softmax, look-ups
    and the memory's few vectors are left out (together under 2 %), and so are pretrained features.
    """
    d, wide, r, layers = config.d_model, config.ff_size, config.ff_bottleneck, config.layers
    if persona is None:
        persona = 8 if config.memory_hops else 20
    infilled = [targets] if config.auxiliary == "infilling" else []  # the response with [BOS], a span two to one
    memories = [context] if config.memory_hops else [context, persona]

    ff = 2 * d * wide if r is None else 2 * (d * r + r * wide)
    encoded = [] if config.features_for == "encoder" else memories + infilled
    encoder = sum(n * layers * (4 * d * d + ff + 2 * n * d) for n in encoded)
    keys_and_values = sum(n * config.unique_layers * 2 * d * d for n in memories + infilled)
    decoder = 0.0
    for attended in (memories, infilled):
        projections = 5 if config.rezero and attended else 4  # Eq. 5 needs O_C apart from O_merge
        decoder += targets * layers * (projections * d * d + ff + 2 * (targets / 2 + sum(attended)) * d)
    projected = context * (2 if config.memory_hops else 1) + 2 * targets + sum(infilled) + sum(memories[1:])
    inputs = 0 if config.embedding_size == d else projected * config.embedding_size * d
    head = 2 * targets * d * sizes.characters
    return 3 * 2 * (encoder + keys_and_values + decoder + inputs + head)
