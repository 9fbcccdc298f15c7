"""The errors a user can cause, and the exit code that each one ends a job with."""

import re
from urllib.parse import urlsplit

NO_CREDENTIALS = (
    "must not hold a user or password: an address is written down; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or "
    "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, instead"
)
"""What is wrong with a URI that holds credentials."""


INTERRUPTED = 130
"""Exit code of a job that its user ended."""


class ArplusError(Exception):
    """An error that the user is told in one message, without a traceback."""

    exit_code = 1


class UsageError(ArplusError, ValueError):
    """The user's input, flag or file is wrong; the message names it and says what to do. Exit code 2."""

    exit_code = 2


class ResourceError(ArplusError):
    """The machine or cluster lacks what the job asks for (CPUs, GPUs, disk, a server). Exit code 3."""

    exit_code = 3


class RefusedError(ArplusError):
    """A server refuses: credentials or bucket are wrong or, where they were right before, S3 is asked too often.

    Exit code 2. It is no :class:`UsageError`: it says nothing of the file that was asked for.
    """

    exit_code = 2


class RunError(ArplusError):
    """A job ended before it was done, by no mistake in its input; the message says what to do. Exit code 1."""


class NonFiniteLossError(RunError):
    """The global loss of a step or the norm of its gradient is not a finite number; the step was not applied."""

    def __init__(self, message: str, index: int = 0) -> None:
        super().__init__(message)
        self.index = index
        """Which of the steps that were read it was, from 0."""


_SCHEME = re.compile(r"\s*(?:[^:/=@]*=)?([A-Za-z][A-Za-z0-9+.-]*):(/{1,2})")
"""Starts an address, or a name and an address as in ``NAME=URI``."""
_IN_TEXT = re.compile(
    r"([A-Za-z][A-Za-z0-9+.-]*):(//)(.*?)(?=[\s'\"(\[{<=,;|`][A-Za-z][A-Za-z0-9+.-]*://|\Z)", re.DOTALL
)
"""An address in a text, and what follows it up to the next one: a password may hold anything."""
_WITHOUT_SCHEME = re.compile(r"(?<![^\s'\"(\[{<=,;|`])(?![\w+.-]+:/)[^\s:@/'\"]+:(?!/)\S*@")
"""``user:password@`` in a text."""
_SECRET_PARAMETER = re.compile(
    r"[?&;#](?:[^=&;#\s]*(?:passw|pwd|passphrase|secret|token|signature|credential|api[-_]?key|access[-_]?key)"
    r"[^=&;#\s]*|sig|auth|authorization|pass)=",
    re.IGNORECASE,
)
_NO_PORT = re.compile(r"[^/?#\[:]+:(?!\d*(?:[/?#]|\Z))")
"""What starts an authority whose ``:`` is not followed by a port: a user and password that lack their host."""
_NO_PORT_IN_TEXT = re.compile(r"[^\s/?#\[:'\"]+:(?!\d*(?:[\s/?#:.,;()\[\]{}'\"|`<>…]|\Z))")


def mask(address: str) -> str:
    """``address``, which is not a local path, without what is a credential or could be meant to be one.

    It is the same where there is none. On a server or database all before the last ``@`` counts, for a password may
    hold ``/``, ``#`` or ``?``. In ``s3://`` it is the bucket's part, in ``file://`` and ``sqlite://`` the host's: keys
    and paths may hold ``@``.
    """
    if match := _SCHEME.match(address):
        return address[: match.end()] + _masked(match[1].lower(), match[2], address[match.end() :], _NO_PORT)
    _, at, host = address.rpartition("@")
    return f"***@{host}" if at else address


def server_problem(url: str) -> str | None:
    """What is wrong with the address of a server, beside a password in it; None for a good one."""
    if not url.lower().startswith(("http://", "https://")):
        return "must begin with http:// or https://"
    try:
        parts = urlsplit(url)
        good = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # a port that is not a number, an open bracket
        good = False
    return None if good and not re.search(r"\s", url) else "must be http://HOST:PORT or https://HOST"


def redact(text: str) -> str:
    """``text`` with the credentials of its addresses masked: they must not be in a message or a log.

    Where an address in it ends is a guess, and rather too much is masked than too little.
    """

    def without(match: re.Match[str]) -> str:
        scheme, slashes, rest = match.groups()
        end = len(rest)
        if _is_path(scheme.lower()) or "@" not in rest:
            end = next((m.start() for m in re.finditer(r"[\s'\"<>`]", rest)), end)
        found = _masked(scheme.lower(), slashes, rest[:end], _NO_PORT_IN_TEXT)
        # A password without its host may hold spaces: nothing says where it ends.
        return f"{scheme}:{slashes}{found}{'' if found == '***' else rest[end:]}"

    return _WITHOUT_SCHEME.sub("***@", _IN_TEXT.sub(without, text))


def _masked(scheme: str, slashes: str, rest: str, no_port: re.Pattern[str]) -> str:
    """What follows ``scheme:`` and its slashes, without credentials."""
    _, at, tail = rest.rpartition("@")
    if _is_path(scheme):
        if scheme != "s3" and (slashes == "/" or rest.startswith("/")):  # an absolute path, on this machine
            return rest
        place = rest.lstrip("/").partition("/")[0]
        if re.search("[@:]", place) or (at and not re.fullmatch("[A-Za-z0-9._-]*", place)):
            return f"***@{tail}" if at else "***"
        return rest
    if secret := _SECRET_PARAMETER.search(rest):
        return "***" if at or no_port.match(rest) else f"{rest[: secret.start() + 1]}***"
    if at:
        return f"***@{tail}"
    return "***" if no_port.match(rest) else rest


def _is_path(scheme: str) -> bool:
    return scheme in ("s3", "file", "models", "runs") or scheme.startswith("sqlite")
