"""What a field of a configuration says of itself in its annotation, and where it is in the tree."""

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator, Mapping
from enum import Enum, auto
from typing import Annotated, Any, NamedTuple

import tyro
from tyro.constructors import PrimitiveConstructorSpec


class Role(Enum):
    """What a setting is to a run, and so when it may change. A setting that says nothing is IDENTITY.

    :mod:`arplus.runs.resume` refuses a run that would go on as another one.
    """

    IDENTITY = auto()
    """What is computed: another value makes another run. Trials of a sweep may differ in it."""
    LABEL = auto()
    """What the run is called: another value makes another run, but no trials can differ in it."""
    BUDGET = auto()
    """How far a run goes: may change when the run goes on, but not within a study, whose runs are compared."""
    OPERATION = auto()
    """Where things are, how they are computed, saved and logged: may change when a run or a study goes on."""


INLINE = tyro.conf.arg(name="")
"""Of a field that holds settings: they are named as if they stood beside it."""
RequiredText = Annotated[str, tyro.conf.arg(help_behavior_hint="(required)")]
"""A text whose default, the empty one, is not a value."""
FREE_TEXT = PrimitiveConstructorSpec(
    nargs=1,
    metavar="STR",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: value is None or isinstance(value, str),
    str_from_instance=lambda value: [str(value)],
)
"""Of anybody's words. An address in them is part of what is said, and the word None is a text like any other on the
command line, where elsewhere it unsets a setting."""


class Required(NamedTuple):
    """Of a setting whose default, nothing, is not a value."""

    what: str
    """What it is to name, for the error."""


class Setting(NamedTuple):
    """One setting of a configuration's class."""

    name: str
    """Its dotted name, as in ``optimizer.lr``."""
    path: tuple[str, ...]
    """The attributes that lead to it."""
    marks: tuple[Any, ...]
    """What its annotation holds, and that of the sections around it."""

    @property
    def role(self) -> Role:
        """The nearest role."""
        return next((mark for mark in self.marks if isinstance(mark, Role)), Role.IDENTITY)

    def of(self, config: Any) -> Any:
        """Its value in ``config``."""
        return functools.reduce(getattr, self.path, config)


def settings_of(
    cls: Any, names: tuple[str, ...] = (), path: tuple[str, ...] = (), outer: tuple[Any, ...] = ()
) -> Iterator[Setting]:
    """All settings of a configuration's class, in the order of its fields; below ``path``, where it is a section."""
    hints = typing.get_type_hints(cls, include_extras=True)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        kind, *marks = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        here = names if INLINE in marks else (*names, f.name)
        if dataclasses.is_dataclass(kind):
            yield from settings_of(kind, here, (*path, f.name), (*marks, *outer))
        else:
            yield Setting(".".join(here), (*path, f.name), (*marks, *outer))


def dotted_names(cls: type) -> list[str]:
    """The names of all settings, as in ``optimizer.lr``."""
    return [setting.name for setting in settings_of(cls)]


def names_of_role(cls: type, *roles: Role) -> list[str]:
    """The names of the settings that have one of ``roles``."""
    return [setting.name for setting in settings_of(cls) if setting.role in roles]


def flat(config: Any) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {setting.name: setting.of(config) for setting in settings_of(type(config))}


def flag(name: str) -> str:
    """A setting's dotted name as it is written on the command line."""
    return name.replace("_", "-")


def did_you_mean(word: str, known: Mapping[str, str]) -> str:
    """The question after the ``known`` word that is nearest, as it is to be shown; "" where none is near."""
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {known[near[0]]}?" if near else ""
