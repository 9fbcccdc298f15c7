"""Rows of an ablation beside the paper's: ``NAME=PRESET,setting=value,…``, and lists of them that have a name."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arplus.config.checks import unknown_key
from arplus.config.settings import Role, flag, flat, names_of_role
from arplus.config.space import parse_value
from arplus.config.training import PRESETS, TrainConfig

INEFFECTIVE = (
    "adapters=arplus,model.adapter=64",
    "unshared-stacks=arplus,model.shared-stacks=False",
    "gelu=no-factor-ff,model.activation=gelu",
    "gate-starts-at-1=arplus,model.gate-start=1",
    "layer-wise-memory=arplus,model.memory-tying=layer-wise",
    "weight-predictor=arplus,model.persona-weight=predicted",
    "linear-schedule=arplus,optimizer.schedule=linear",
)
"""What the paper tried and found without effect, or left out, and gives no number for."""
PRESET_STUDIES: dict[str, Sequence[str]] = {"ineffective": INEFFECTIVE}
"""Variants by the study's name (``--preset-study``)."""
_OF_THE_STUDY = {"seed": "--seeds", "feed.max_examples": "--sessions"}
"""Settings that the study itself gives its runs."""


@dataclass(frozen=True)
class Row:
    """A row of an ablation's tables: a preset, or a variant of one."""

    name: str
    preset: str
    values: Mapping[str, Any] = field(default_factory=dict)
    """What a variant changes, by dotted name; of a preset nothing."""

    @property
    def is_variant(self) -> bool:
        """Whether it is not a preset."""
        return self.name != self.preset


def parse_variant(text: str) -> Row:
    """The row of ``NAME=PRESET,setting=value,…``; a setting that holds several values is named once for each.

    Raises :class:`ValueError` naming the item and the problem.
    """
    head, *settings = (part.strip() for part in text.split(","))
    name, _, preset = (part.strip() for part in head.partition("="))
    if not re.fullmatch(r"\w[\w.-]{0,99}", name) or not settings:
        raise ValueError(f"{text}: must be NAME=PRESET,setting=value,… with a NAME of letters, digits and . _ -")
    if name in PRESETS:
        raise ValueError(f"{text}: {name} is a preset; give the variant another name")
    if preset not in PRESETS:
        raise ValueError(f"{text}: names no preset of {', '.join(PRESETS)} (got {preset!r})")
    defaults, valid = flat(TrainConfig()), names_of_role(TrainConfig, Role.IDENTITY)
    values: dict[str, Any] = {}
    for part in settings:
        setting, equals, value = (piece.strip() for piece in part.partition("="))
        key = setting.replace("-", "_")
        if key in _OF_THE_STUDY:
            raise ValueError(f"{text}: {setting} is what {_OF_THE_STUDY[key]} sets")
        if key not in valid:
            raise ValueError(f"{text}: {unknown_key(setting, [flag(n) for n in valid])}")
        if not equals:
            raise ValueError(f"{text}: {setting} has no value; write {setting}=VALUE")
        several = isinstance(defaults[key], tuple)
        values[key] = (*values.get(key, ()), value) if several else parse_value(value)
    return Row(name, preset, values)


def variants_of(study: str | None, items: Sequence[str]) -> list[Row]:
    """The variants of a preset study and those given one by one. Raises :class:`ValueError` as the parser does."""
    rows = [parse_variant(item) for item in (*PRESET_STUDIES.get(study or "", ()), *items)]
    names = [row.name for row in rows]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]} is the name of two variants")
    return rows
