"""What every job shares: a command line made from the configuration's types, logging, and exit codes.

Exit codes: 0 done, 2 the user's error, 3 missing resources, 1 anything else (with a traceback).
"""

import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from arplus.config import checked, dotted_names, flag, unknown_key
from arplus.errors import UserError

T = TypeVar("T")


def parse(default: T, arguments: Sequence[str], *, prog: str, description: str) -> T:
    """``default`` with the settings that ``arguments`` override, checked.

    ``--help`` prints every setting with its default and exits 0. Raises :class:`UserError` for an unknown flag (with
    the list of valid ones) and for a value that fails a check; exits 2 with tyro's message for a value that is not of
    the flag's type.
    """
    valid = [flag(name) for name in dotted_names(type(default))]
    for argument in arguments:
        name = flag(argument.partition("=")[0].removeprefix("--"))
        if argument.startswith("--") and name not in [*valid, "help"]:
            raise UserError(f"command line: {unknown_key(name, valid)}")
    config = tyro.cli(
        type(default),
        default=default,
        args=list(arguments),
        prog=prog,
        description=description,
        config=(tyro.conf.FlagConversionOff,),
    )
    return checked(config)


def run(main: Callable[[], Any]) -> None:
    """Runs a job's ``main`` with the project's logging, and ends the process with the matching exit code."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr
    )
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
