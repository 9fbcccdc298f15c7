"""What every job shares: a command line made from the configuration's types, logging, and exit codes.

Exit codes: 0 done, 2 the user's error, 3 missing resources, 130 interrupted, 1 anything else (with a traceback where
it is a bug).
"""

import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar, cast

import tyro

from arplus import proxies, storage
from arplus.config import (
    PRESETS,
    TrainConfig,
    dotted_names,
    flag,
    flat,
    from_dict,
    preset,
    tiny,
    to_dict,
    unknown_key,
    validate,
)
from arplus.config.checks import FREE_TEXT
from arplus.errors import ArplusError, UsageError, mask

T = TypeVar("T")
C = TypeVar("C", bound=TrainConfig)
_QUOTED_NONE = "\0None"
"""What no command line holds."""


def parse(default: T, arguments: Sequence[str], *, prog: str, description: str | None) -> T:
    """``default`` with the settings that ``arguments`` override, checked.

    ``--help`` prints every setting with its default and exits 0. A bool's flag may stand alone, for True. The word None
    unsets a setting that may be None, such as an address; what is free text (:data:`FREE_TEXT`) takes it as text, and
    so does every setting that is never None, such as a name. Raises
    :class:`UsageError` for an unknown flag (with the list of valid ones) and for a value that fails a check; exits 2
    with tyro's message for a value that is not of the flag's type.
    """
    valid = [flag(name) for name in dotted_names(type(default))]
    for argument in arguments:
        if not storage.is_utf8(argument):  # Ray fails at such a command line with a traceback
            raise UsageError(f"command line: {mask(storage.printable(argument))} is not UTF-8; rename what it names")
        name = flag(argument.partition("=")[0].removeprefix("--"))
        if argument.startswith("--") and name not in [*valid, "help"]:
            raise UsageError(f"command line: {unknown_key(name, valid)}")
    texts = {f.name for f in fields(cast(Any, default)) if f.metadata == FREE_TEXT}
    arguments = _with_true(arguments, {flag(name) for name, value in flat(default).items() if isinstance(value, bool)})
    config = tyro.cli(
        type(default),
        default=default,
        args=_with_quoted_none(arguments, set(map(flag, texts))),
        prog=prog,
        description=" ".join(filter(None, [description, "The word None unsets a setting that may be None."])),
        config=(tyro.conf.FlagConversionOff, tyro.conf.UseAppendAction),
    )
    quoted = {name: "None" for name in texts if getattr(config, name) == _QUOTED_NONE}
    return validate(replace(cast(Any, config), **quoted))


def _with_quoted_none(arguments: Sequence[str], texts: set[str]) -> list[str]:
    """``arguments`` with the word None that follows one of ``texts`` spelled so that tyro takes it for a text."""
    found = list(arguments)
    for i, (argument, following) in enumerate(pairwise([*arguments, ""])):
        name, equals, value = argument.partition("=")
        if name.startswith("--") and flag(name.removeprefix("--")) in texts:
            if value == "None":
                found[i] = f"{name}={_QUOTED_NONE}"
            elif not equals and following == "None":
                found[i + 1] = _QUOTED_NONE
    return found


def _with_true(arguments: Sequence[str], switches: set[str]) -> list[str]:
    """``arguments`` with True after those of ``switches`` that stand alone: ``--audit`` is ``--audit True``."""
    found = []
    for argument, following in pairwise([*arguments, "--"]):
        found.append(argument)
        if argument.startswith("--") and flag(argument.removeprefix("--")) in switches and following.startswith("-"):
            found.append("True")
    return found


class Command(NamedTuple, Generic[C]):
    """What the command line of a job that trains says."""

    config: C
    dry_run: bool


def train_command(arguments: Sequence[str], *, prog: str) -> Command[TrainConfig]:
    """Reads the command line of a training run; see :func:`preset_command`."""
    return preset_command(arguments, lambda run: run, prog=prog, description="Trains one of the paper's rows.")


def preset_command(
    arguments: Sequence[str],
    widen: Callable[[TrainConfig], C],
    *,
    prog: str,
    description: str,
    only: str | None = None,
) -> Command[C]:
    """Reads ``PRESET [--tiny] [--config FILE] [--dry-run] [settings by dotted name]``.

    ``widen`` makes the job's settings, with its own defaults, of the preset's. Later ones win: the preset, ``--tiny``,
    the file, the settings. A file that a run wrote (``config.json``) names its preset, so PRESET can then be left out.
    A job that has ``only`` one preset takes no PRESET. Raises :class:`UsageError` as :func:`parse` does.
    """
    rest = list(arguments)
    name = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if only is not None:
        if name is not None:
            raise UsageError(f"{prog} takes no preset; leave {name!r} out")
        name = only
    shrink, dry_run = _take_switch(rest, "--tiny"), _take_switch(rest, "--dry-run")
    file = _take_value(rest, "--config")
    values: Any = storage.read_json(file) if file else {}
    if not isinstance(values, dict) or not isinstance(values.get("preset", ""), str):
        raise UsageError(f"{file}: must hold a JSON object of settings, with a preset's name if it names one")
    if name is not None and values.get("preset", name) != name:
        advice = f"{prog} takes no other" if only else "leave PRESET out or make them agree"
        raise UsageError(f"{file}: is of preset {values['preset']!r}, not {name!r}; {advice}")
    name = name or values.get("preset")
    if name is None and not {"-h", "--help"} & set(rest):
        raise UsageError(f"a preset is required: {prog} PRESET …, one of {', '.join(PRESETS)}")
    row = preset(name or "arplus")
    default = widen(tiny(row) if shrink else row)
    if values:
        default = from_dict(type(default), _merged(to_dict(default), values), source=str(file))
    choice = "" if only else f"PRESET is one of {', '.join(PRESETS)}. "
    description = (
        f"{description} {choice}--tiny shrinks the model to seconds of training, --config FILE reads settings from a "
        f"JSON file such as a run's config.json, --dry-run prints what would be done and starts nothing. The defaults "
        f"below are those of {default.preset}."
    )
    config = parse(default, rest, prog=prog if only else f"{prog} PRESET", description=description)
    if config.preset != default.preset:
        advice = "leave it out" if only else f"write {prog} {config.preset} …"
        raise UsageError(f"--preset: only names what the defaults are; {advice}")
    for field, problem in config.name_problems():
        raise UsageError(f"command line: --{flag(field)}: {problem}")
    return Command(config, dry_run)


def _take_switch(arguments: list[str], name: str) -> bool:
    for i, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option != name:
            continue
        follows = not equals and arguments[i + 1 : i + 2] in (["True"], ["False"])
        value = arguments[i + 1] if follows else value if equals else "True"
        if value not in ("True", "False"):
            raise UsageError(f"{name}: must be True or False (got {value!r})")
        del arguments[i : i + 1 + follows]
        return value == "True"
    return False


def _take_value(arguments: list[str], name: str) -> str | None:
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            del arguments[i]
            value = argument.partition("=")[2]
        elif argument == name:
            value = "".join(arguments[i + 1 : i + 2])
            del arguments[i : i + 2]
        else:
            continue
        if not value:
            raise UsageError(f"{name}: needs a value")
        return value
    return None


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the values of ``changes``, section by section."""
    return base | {
        key: _merged(base[key], value) if isinstance(value, dict) and isinstance(base.get(key), dict) else value
        for key, value in changes.items()
    }


def run(main: Callable[[], Any]) -> None:
    """Runs a job's ``main`` with the project's logging, and ends the process with the matching exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    proxies.bypass()
    try:
        main()
    except ArplusError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
