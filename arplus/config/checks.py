"""Configurations as plain values and back: the one place where values are checked."""

import dataclasses
import difflib
import functools
import math
import operator
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from arplus.config.settings import dotted_names, flag, flat, settings_of
from arplus.errors import NO_CREDENTIALS, UsageError, mask, redact

T = TypeVar("T")

_ADDRESS = re.compile(r"\s*([^:/=@]*=)?[A-Za-z][A-Za-z0-9+.-]*:/")
"""Starts a setting that is a URI, or a name and a URI."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, section by section, ready for JSON."""
    plain = dataclasses.asdict(config)
    return _nested(
        (setting.name.split("."), functools.reduce(operator.getitem, setting.path, plain))
        for setting in settings_of(type(config))
    )


def from_dict(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Builds and checks a configuration from plain values, as :func:`to_dict` gives them; missing keys take defaults.

    Raises :class:`UsageError` naming ``source``, the flag and the problem; for an unknown key it lists the valid ones.
    """
    return _build(cls, {}, values, source)


def with_values(config: T, values: Mapping[str, Any], *, source: str) -> T:
    """``config`` with other values, in sections or by dotted name, checked as in :func:`from_dict`."""
    return _build(type(config), flat(config), values, source)


def validate(config: T, *, source: str = "command line") -> T:
    """The same configuration, after every check of :func:`from_dict`."""
    return with_values(config, {}, source=source)


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that is none of ``valid``, nearest name first."""
    near = difflib.get_close_matches(key, valid, n=1)
    return f"unknown key {key!r}{f' (did you mean {near[0]!r}?)' if near else ''}; valid keys: {', '.join(valid)}"


def _build(cls: type[T], base: Mapping[str, Any], values: Mapping[str, Any], source: str) -> T:
    found = []
    for key, value in (*base.items(), *_leaves(values, dotted_names(cls))):
        if (path := _path(cls, key)) is None:
            raise UsageError(f"{source}: {unknown_key(key, dotted_names(cls))}")
        found.append((path, value))
    try:
        config = TypeAdapter(cls).validate_python(_nested(found))
    except ValidationError as error:
        problems = [(_name(cls, e["loc"]), f"{_lower(e['msg'])} (got {e['input']!r})") for e in error.errors()]
    else:
        problems = list(_check(config))
    if problems:
        lines = dict.fromkeys(f"{source}: --{flag(name)}: {problem}" for name, problem in problems)
        raise UsageError(redact("; ".join(lines)))
    return config


def _leaves(values: Mapping[str, Any], names: list[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted name; an empty section has none, and one of ``names`` may itself be a mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix + key not in names:
            yield from _leaves(value, names, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(values: Iterable[tuple[Sequence[str], Any]]) -> dict[str, Any]:
    """Values by the names on the way to them, a dict a section; a later one takes an earlier one's place."""
    found: dict[str, Any] = {}
    for (*sections, last), value in values:
        functools.reduce(lambda section, name: section.setdefault(name, {}), sections, found)[last] = value
    return found


def _path(cls: type, key: str) -> tuple[str, ...] | None:
    """The attributes that lead to the setting, or the section, of that dotted name."""
    for name, path, *_ in settings_of(cls):
        if f"{name}.".startswith(f"{key}."):
            return path[: len(path) + key.count(".") - name.count(".")]
    return None


def _name(cls: type, location: tuple[int | str, ...]) -> str:
    """The name of what a pydantic error is about: the longest start of its location (unions add type names)."""
    for n in range(len(location), 0, -1):
        for name, path, *_ in settings_of(cls):
            if path[:n] == location[:n]:
                return name.rsplit(".", len(path) - n)[0]
    return ".".join(map(str, location))


def _check(config: Any) -> Iterator[tuple[str, str]]:
    """Yields (setting, problem) for what the types do not say."""
    sections = {}
    for setting in settings_of(type(config)):
        value = setting.of(config)
        sections[setting.path[:-1]] = setting.name.rpartition(".")
        if not setting.free_text and any(map(_with_credentials, value if isinstance(value, tuple) else (value,))):
            yield setting.name, NO_CREDENTIALS
        elif isinstance(value, float) and not math.isfinite(value):  # JSON, so a run's config.json, has no infinity
            yield setting.name, f"must be finite (got {value})"
    for path, (prefix, dot, _) in sections.items():
        section = functools.reduce(getattr, path, config)
        for name, problem in section.check() if hasattr(section, "check") else ():
            yield prefix + dot + name, problem


def _with_credentials(value: Any) -> bool:
    return isinstance(value, str) and _ADDRESS.match(value) is not None and mask(value) != value


def _lower(message: str) -> str:
    return message[:1].lower() + message[1:]
