"""Every setting of every job: typed, documented, with one default in one place.

A configuration is a tree of frozen dataclasses. The command line is made from these types (:mod:`arplus.cli`);
:func:`from_dict` reads the ``config.json`` that every run writes, and is the one place where values are checked.

Modules: ``model`` (the network) · ``optimization`` (losses and AdamW) · ``training`` (a run, and the presets) ·
``placement`` (GPUs and nodes of workers) · ``studies`` (sweeps, ablations and range tests) · ``space`` (what a sweep
varies) · ``variants`` (an ablation's rows beside presets) · ``jobs`` (all other jobs) · ``rules`` (from sessions to
examples) · ``names`` (of runs and experiments) · ``gpus`` (their peaks) · ``settings`` (what a field says of itself:
when it may change, what may be searched) · ``checks`` (plain values and back).
"""

from arplus.config.checks import (
    from_dict,
    to_dict,
    unknown_flag,
    validate,
    with_values,
)
from arplus.config.gpus import PEAK_TFLOPS
from arplus.config.jobs import (
    RESERVED_SPLITS,
    ChatConfig,
    EvaluateConfig,
    ExportConfig,
    PrepareConfig,
    Sampling,
    SynthesizeConfig,
    VectorsConfig,
)
from arplus.config.model import (
    SPECIAL_TOKENS,
    FeaturesConfig,
    ModelConfig,
    SpecialIds,
    VocabularySizes,
    special_ids,
)
from arplus.config.optimization import ObjectiveConfig, OptimizerConfig
from arplus.config.placement import PlacementConfig
from arplus.config.rules import ExampleRules
from arplus.config.settings import INLINE, Required, RequiredText, Role, dotted_names, flag, flat, names_of_role
from arplus.config.space import Dimension, parse_space
from arplus.config.studies import AblateConfig, LrFindConfig, StudyConfig, TuneConfig
from arplus.config.training import (
    AR,
    MIN_WORKER_CPUS,
    PAPER_ROWS,
    PRESETS,
    Device,
    EstimateConfig,
    FeedConfig,
    InitConfig,
    TrainConfig,
    preset,
    tiny,
)
from arplus.config.variants import Row
