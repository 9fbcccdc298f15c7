"""Configurations as plain values and back: the one place where values are checked."""

import dataclasses
import difflib
import functools
import math
import re
import typing
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from arplus.errors import NO_CREDENTIALS, UsageError, mask, redact

T = TypeVar("T")

_ADDRESS = re.compile(r"\s*([^:/=@]*=)?[A-Za-z][A-Za-z0-9+.-]*:/")
"""Starts a setting that is a URI, or a name and a URI."""
FREE_TEXT = {"free text": True}
"""A field's metadata: anybody's words. An address in it is part of what is said, and the word None is a text like any
other on the command line, where elsewhere it unsets a setting."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, ready for JSON."""
    return dataclasses.asdict(config)


def from_dict(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Builds and checks a configuration from plain values, as :func:`to_dict` gives them; missing keys take defaults.

    Raises :class:`UsageError` naming ``source``, the flag and the problem; for an unknown key it lists the valid ones.
    """
    valid = list(dotted_names(cls))
    for key in _leaves(values, valid):
        if key not in valid and not any(name.startswith(key + ".") for name in valid):
            raise UsageError(f"{source}: {unknown_key(key, valid)}")
    try:
        config = TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        problems = [(_location(e["loc"], valid), f"{_lower(e['msg'])} (got {e['input']!r})") for e in error.errors()]
    else:
        problems = list(_check(config))
    if problems:
        lines = dict.fromkeys(f"{source}: --{flag(name)}: {problem}" for name, problem in problems)
        raise UsageError(redact("; ".join(lines)))
    return config


def validate(config: T, *, source: str = "command line") -> T:
    """The same configuration, after every check of :func:`from_dict`."""
    return from_dict(type(config), to_dict(config), source=source)


def dotted_names(cls: Any, prefix: str = "") -> Iterator[str]:
    """Names of all settings below the dataclass ``cls``, as in ``optimizer.lr``."""
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[f.name]):
            yield from dotted_names(hints[f.name], f"{prefix}{f.name}.")
        else:
            yield prefix + f.name


def flat(config: Any) -> dict[str, Any]:
    """Every setting by its dotted name."""
    return {name: functools.reduce(getattr, name.split("."), config) for name in dotted_names(type(config))}


def flag(name: str) -> str:
    """A setting's dotted name as it is written on the command line."""
    return name.replace("_", "-")


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that is none of ``valid``, nearest name first."""
    near = difflib.get_close_matches(key, valid, n=1)
    return f"unknown key {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}; valid keys: {', '.join(valid)}"


def _leaves(values: Mapping[str, Any], valid: list[str], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value and prefix + key not in valid:  # one that is valid is a mapping itself
            yield from _leaves(value, valid, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _location(loc: tuple[int | str, ...], valid: list[str]) -> str:
    """The setting a pydantic error is about: the longest start of its location that is one (unions add type names)."""
    names = [".".join(map(str, loc[:n])) for n in range(len(loc), 0, -1)]
    return next((name for name in names if name in valid), names[0])


def _check(config: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    for f in dataclasses.fields(config):
        if dataclasses.is_dataclass(value := getattr(config, f.name)):
            yield from _check(value, f"{prefix}{f.name}.")
        elif f.metadata != FREE_TEXT and any(map(_with_credentials, _parts(value))):
            yield prefix + f.name, NO_CREDENTIALS
        elif isinstance(value, float) and not math.isfinite(value):  # JSON, so a run's config.json, has no infinity
            yield prefix + f.name, f"must be finite (got {value})"
    if hasattr(config, "check"):
        yield from ((prefix + name, problem) for name, problem in config.check())


def _with_credentials(value: Any) -> bool:
    return isinstance(value, str) and _ADDRESS.match(value) is not None and mask(value) != value


def _parts(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
