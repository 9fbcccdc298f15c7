"""Configurations as plain values and back: the one place where values are checked."""

import dataclasses
import functools
import math
import operator
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from arplus.config.settings import FREE_TEXT, Required, did_you_mean, flag, flat, settings_of
from arplus.errors import NO_CREDENTIALS, UsageError, mask, redact

T = TypeVar("T")

_ADDRESS = re.compile(r"\s*([^:/=@]*=)?[A-Za-z][A-Za-z0-9+.-]*:/")
"""Starts a setting that is a URI, or a name and a URI."""


def to_dict(config: Any) -> dict[str, Any]:
    """The configuration as plain values, section by section, ready for JSON."""
    plain = dataclasses.asdict(config)
    return _nested(
        (setting.name.split("."), list(value) if isinstance(value, tuple) else value)
        for setting in settings_of(type(config))
        for value in [functools.reduce(operator.getitem, setting.path, plain)]
    )


def from_dict(cls: type[T], values: Mapping[str, Any], *, source: str) -> T:
    """Builds and checks a configuration from plain values, as :func:`to_dict` gives them; missing keys take defaults.

    Raises :class:`UsageError` naming ``source``, the flag and the problem; for an unknown key it lists the valid ones.
    The command line is not a source: there the flag says enough.
    """
    return _build(cls, {}, values, source)


def with_values(config: T, values: Mapping[str, Any], *, source: str) -> T:
    """``config`` with other values, in sections or by dotted name, checked as in :func:`from_dict`."""
    return _build(type(config), flat(config), values, source)


def validate(config: T, *, source: str = "") -> T:
    """The same configuration, after every check of :func:`from_dict`."""
    return with_values(config, {}, source=source)


def unknown_key(key: str, valid: list[str]) -> str:
    """The message for a key that is none of ``valid``, nearest name first."""
    meant = did_you_mean(key, {name: repr(name) for name in valid})
    return f"unknown key {key!r}{meant and f' ({meant})'}; valid keys: {', '.join(valid)}"


def unknown_flag(word: str, valid: list[str]) -> str:
    """The message for a word of a command line that is none of the flags of the settings ``valid``, nearest first."""
    kind = "flag" if word.startswith("-") else "argument"
    meant = did_you_mean(word.lstrip("-"), {flag(name): f"--{flag(name)}" for name in valid})
    return f"unknown {kind} {word!r}{meant and f'; {meant}'} (--help lists all flags)"


def _build(cls: type[T], base: Mapping[str, Any], values: Mapping[str, Any], source: str) -> T:
    paths = {setting.name: setting.path for setting in settings_of(cls)}
    found = {**base, **dict(_leaves(values, paths))}
    if unknown := [key for key in found if key not in paths]:
        raise UsageError(f"{source}: {unknown_key(unknown[0], list(paths))}")
    try:
        config = TypeAdapter(cls).validate_python(_nested((paths[name], value) for name, value in found.items()))
    except ValidationError as error:
        problems = [
            (_name(paths, e["loc"]), f"{_lower(e['msg'].replace('Input should', 'must', 1))} (got {e['input']!r})")
            for e in error.errors()
        ]
    else:
        problems = list(_check(config))
    if problems:
        where = f"{source}: " if source else ""
        lines = dict.fromkeys(f"{where}--{flag(name)}: {problem}" for name, problem in problems)
        raise UsageError(redact("; ".join(lines)))
    return config


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _leaves(values: Mapping[str, Any], names: Container[str], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values by dotted name; an empty section has none, and one of ``names`` may itself be a mapping."""
    for key, value in values.items():
        if isinstance(value, Mapping) and prefix + key not in names:
            yield from _leaves(value, names, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _nested(values: Iterable[tuple[Sequence[str], Any]]) -> dict[str, Any]:
    """Values by the names on the way to them, a dict per section."""
    found: dict[str, Any] = {}
    for (*sections, last), value in values:
        functools.reduce(lambda section, name: section.setdefault(name, {}), sections, found)[last] = value
    return found


def _name(paths: Mapping[str, tuple[str, ...]], location: tuple[int | str, ...]) -> str:
    """The setting that a pydantic error is about: the start of its location, as unions add type names."""
    found = (name for name, path in paths.items() if path == location[: len(path)])
    return next(found, ".".join(map(str, location)))


def _check(config: Any) -> Iterator[tuple[str, str]]:
    """Yields (setting, problem) for what the types do not say."""
    sections = {}
    for setting in settings_of(type(config)):
        value = setting.of(config)
        sections[setting.path[:-1]] = setting.name.rpartition(".")
        required = next((mark for mark in setting.marks if isinstance(mark, Required)), None)
        if required and not value:
            yield setting.name, f"is required: {required.what}"
        if FREE_TEXT not in setting.marks and any(
            map(_with_credentials, value if isinstance(value, tuple) else (value,))
        ):
            yield setting.name, NO_CREDENTIALS
        elif isinstance(value, float) and not math.isfinite(value):  # JSON, so a run's config.json, has no infinity
            yield setting.name, f"must be finite (got {value})"
    for path, (prefix, dot, _) in sections.items():
        section = functools.reduce(getattr, path, config)
        for name, problem in section.check() if hasattr(section, "check") else ():
            yield prefix + dot + name, problem


def _with_credentials(value: Any) -> bool:
    return isinstance(value, str) and _ADDRESS.match(value) is not None and mask(value) != value
