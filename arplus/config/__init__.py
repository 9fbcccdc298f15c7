"""Every setting of every job: typed, documented, with one default in one place.

A configuration is a tree of frozen dataclasses. The command line is made from these types (:mod:`arplus.cli`);
:func:`from_dict` reads the ``config.json`` that every run writes, and is the one place where values are checked.

Modules: ``model`` (the network) · ``training`` (a run, and the paper's rows as presets) · ``jobs`` (all other jobs) ·
``checks`` (plain values and back).
"""

from arplus.config.checks import (
    checked,
    dotted_names,
    flag,
    flat,
    from_dict,
    to_dict,
    unknown_key,
)
from arplus.config.jobs import (
    RESERVED_SPLITS,
    ChatConfig,
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    Sampling,
    SynthesizeConfig,
)
from arplus.config.model import (
    SPECIAL_TOKENS,
    ModelConfig,
    SpecialIds,
    VocabularySizes,
    special_ids,
)
from arplus.config.training import (
    AR,
    PRESETS,
    FeedConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
    preset,
    tiny,
)

__all__ = [
    "AR",
    "PRESETS",
    "RESERVED_SPLITS",
    "SPECIAL_TOKENS",
    "ChatConfig",
    "EvaluateConfig",
    "ExportConfig",
    "FeedConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "PrepareConfig",
    "Sampling",
    "SpecialIds",
    "SynthesizeConfig",
    "TrainConfig",
    "VocabularySizes",
    "checked",
    "dotted_names",
    "flag",
    "flat",
    "from_dict",
    "preset",
    "special_ids",
    "tiny",
    "to_dict",
    "unknown_key",
]
