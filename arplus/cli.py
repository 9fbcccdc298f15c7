"""What every job shares: a command line made from the configuration's types, logging, and exit codes.

Exit codes: 0 done, 2 the user's error, 3 missing resources, 130 interrupted, 1 anything else (with a traceback where
it is a bug).
"""

import gc
import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Generic, TypeVar
from unittest import mock

import docstring_parser
import tyro
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from arplus import proxies, storage
from arplus.config import (
    INLINE,
    PRESETS,
    TrainConfig,
    dotted_names,
    flag,
    preset,
    tiny,
    unknown_flag,
    validate,
    with_values,
)
from arplus.errors import INTERRUPTED, ArplusError, UsageError, mask
from arplus.process import SUBMITTED

T = TypeVar("T")

_SUBMIT = "ray job submit --working-dir . --"
_TYPES = ConstructorRegistry()
"""What is read otherwise than tyro does."""


@_TYPES.primitive_rule
def _switch(kind: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[bool] | None:
    """A bool's flag takes True or False, or may stand alone, for True."""
    if kind.type is not bool:
        return None
    words = {"True": True, "False": False}

    def read(found: list[str]) -> bool:
        if found and found[0] not in words:
            raise ValueError(f"must be True or False (got {found[0]!r})")
        return not found or words[found[0]]

    return PrimitiveConstructorSpec(
        nargs=(0, 1),
        metavar="[{True,False}]",
        instance_from_str=read,
        is_instance=lambda value: isinstance(value, bool),
        str_from_instance=lambda value: [str(value)],
    )


def parse(default: T, arguments: Sequence[str], *, prog: str, description: str | None = None) -> T:
    """``default`` with the settings that ``arguments`` override, checked.

    ``--help`` prints the settings with their defaults and exits 0. A bool's flag may stand alone, for True. The word
    None unsets a setting that may be None, such as an address; what is free text takes it as text, and so does every
    setting that is never None, such as a name. Raises :class:`UsageError` for an unknown flag (with the nearest one)
    and for a value that fails a check; exits 2 with tyro's message for a value that is not of the flag's type.
    """
    return validate(_read(type(default), default, arguments, dotted_names(type(default)), prog, description))


def _read(
    kind: type[T], default: T, arguments: Sequence[str], names: list[str], prog: str, description: str | None
) -> T:
    for argument in arguments:
        if not storage.is_utf8(argument):  # Ray fails at such a command line with a traceback
            raise UsageError(f"{mask(storage.printable(argument))} is not UTF-8; rename what it names")
    text = f"{description or kind.__doc__} The word None unsets a setting that shows {{None}}."
    text = " ".join(text.split())  # a docstring's lines, which tyro would leave as they are
    found, unknown = _tyro(kind, default=default, args=arguments, prog=prog, description=text)
    if unknown:
        raise UsageError(unknown_flag(mask(unknown[0].partition("=")[0]), names))
    return found


def _tyro(kind: type[T], **settings: Any) -> tuple[T, list[str]]:
    """What tyro reads of a command line, and what it does not know."""
    marks = (tyro.conf.FlagConversionOff, tyro.conf.UseAppendAction)
    # tyro joins the lines of a field's docstring where none is indented, as docstring_parser 0.18 leaves them.
    with mock.patch("docstring_parser.parse_from_object", _parse_without_indentation):
        return tyro.cli(kind, return_unknown_args=True, config=marks, registry=_TYPES, **settings)


def _parse_without_indentation(
    of: Any, parse: Callable[[Any], docstring_parser.Docstring] = docstring_parser.parse_from_object
) -> docstring_parser.Docstring:
    found = parse(of)
    for field in found.params:
        field.description = field.description and " ".join(field.description.split())
    return found


@dataclass(frozen=True, kw_only=True)
class Switches:
    """What a job that trains takes beside its settings."""

    tiny: bool = False
    """Shrink the network, so that a CPU trains it in minutes."""
    file: Annotated[str | None, tyro.conf.arg(name="config")] = None
    """JSON file of settings, such as the config.json of a run. It wins over the preset and --tiny, and flags win over
    it."""
    dry_run: bool = False
    """Print the settings and what they come to, such as memory and hours, and start nothing."""


@dataclass(frozen=True, kw_only=True)
class Command(Switches, Generic[T]):
    """What the command line of a job that trains says."""

    config: Annotated[T, INLINE]
    """The job's settings."""


def train_command(arguments: Sequence[str], *, prog: str) -> Command[TrainConfig]:
    """Reads the command line of a training run; see :func:`preset_command`."""
    description = "Trains AR+ (arplus), its baseline AR (ar), or AR+ without one of its methods (no-…)."
    return preset_command(arguments, lambda run: run, prog=prog, description=description)


def preset_command(
    arguments: Sequence[str],
    widen: Callable[[TrainConfig], T],
    *,
    prog: str,
    description: str,
    only: str | None = None,
) -> Command[T]:
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
    completion = [word for word in rest if word.startswith("--tyro-")]  # tyro's own flags, for all settings below
    words = [word for word in rest if word not in completion]
    switches, _ = _tyro(Switches, args=words, prog=prog, add_help=False)
    file = switches.file
    values: Any = {} if file is None else storage.read_json(file)
    if not isinstance(values, dict) or not isinstance(values.get("preset", ""), str):
        raise UsageError(f"{file}: must hold a JSON object of settings, with a preset's name if it names one")
    if name is not None and values.get("preset", name) != name:
        advice = f"{prog} takes no other" if only else "leave PRESET out or make them agree"
        raise UsageError(f"{file}: is of preset {values['preset']!r}, not {name!r}; {advice}")
    name = name or values.get("preset")
    if name is None and not {"-h", "--help", *completion} & set(rest):
        raise UsageError(f"a preset is required: {prog} PRESET …, one of {', '.join(PRESETS)}")
    row = preset(name or "arplus")
    default = with_values(widen(tiny(row) if switches.tiny else row), values, source=str(file))
    choice = "" if only else f"PRESET is one of {', '.join(PRESETS)}. "
    kind = type(default)
    command: Command[T] = _read(
        Command[kind],  # type: ignore[valid-type]
        Command(config=default),
        rest,
        [*dotted_names(kind), "tiny", "config", "dry_run"],
        prog if only else f"{prog} PRESET",
        f"{description} {choice}The defaults below are those of {row.preset}.",
    )
    run: Any = getattr(command.config, "run", command.config)
    if run.preset != row.preset:
        advice = "leave it out" if only else f"write {prog} {run.preset} …"
        raise UsageError(f"--preset: only names what the defaults are; {advice}")
    for field, problem in run.name_problems():
        raise UsageError(f"--{flag(field)}: {problem}")
    return replace(command, config=validate(command.config))


def submit_line(prog: str, arguments: Sequence[str]) -> str:
    """The command that gives a cluster the job whose ``--dry-run`` this is."""
    kept = list(arguments)
    for i, word in reversed([*enumerate(kept)]):
        if word.replace("_", "-").partition("=")[0] == "--dry-run":
            del kept[i : i + 1 + (kept[i + 1 : i + 2] == ["True"])]
    return f"on a cluster: {_SUBMIT} {shlex.join(['python', prog, *kept])}"


def next_job(job: str, **flags: object) -> str:
    """The command of a job with these flags, but for those that are not set; True stands alone."""
    words = ["python", *job.split()]
    for name, value in flags.items():
        if value:
            words += [f"--{flag(name)}", *([] if value is True else [str(value)])]
    return shlex.join(words)


def conclude(found: Mapping[str, str | None]) -> None:
    """Ends a job's log with one block: by name, where its results are and what to do next; None is left out.

    It goes to stderr, as all of the log does: what a job prints to stdout is for other programs. After a submitted job,
    the next one is to be submitted too.
    """
    sys.stdout.flush()  # in a submitted job's log both are one file
    rows = {name: value for name, value in found.items() if value}
    if "next" in rows and SUBMITTED in os.environ:
        rows["next"] = f"{_SUBMIT} {rows['next']}"
    width = max(map(len, rows))
    print("\n".join(["", *(f"{name:{width}}  {value}" for name, value in rows.items())]), file=sys.stderr)


class _Printed(logging.Handler):
    """Log lines go by ``print``: Ray makes it one that takes its progress bar out of the way."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            print(f"{self.format(record)}\n", end="", file=sys.stderr)  # by one write, which nothing gets into
        except Exception:
            self.handleError(record)


def run(main: Callable[[], Any]) -> None:
    """Runs a job's ``main`` with the project's logging, and ends the process with the matching exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", handlers=[_Printed()]
    )
    proxies.bypass()
    try:
        main()
    except ArplusError as error:
        print(f"{'interrupted' if error.exit_code == INTERRUPTED else 'error'}: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    finally:
        gc.freeze()  # else Python's end looks through all that torch and MLflow are made of: nearly two seconds
