"""Which MLflow errors are final and which are tried again, and the advice given to the user.

The rule, for MLflow and for the store that its artifacts lie in:

- *May pass*, and is tried again: no connection, a timeout, HTTP 408, 425, 429 and 5xx (but 501 and 505), S3's
  throttling (also where it comes as 400), a database that is locked or has no connection free, and whatever is not
  known here.
- *Final*, and given up at once: any other HTTP status of 400 and above, MLflow's codes for a wrong request, no or wrong
  credentials, a package that is missing, a certificate that is not trusted, a file that is gone or cannot be read.

A refusal is final for the request that met it, and for no other: what is logged later is sent all the same. So a proxy
that answers 403 for a while costs what was logged in that while, and ``replay`` sends it from the record; nothing
guesses whether a 403 will pass. The only split is that of a batch of which one value is refused: the others arrive.

Types are known by their names, as the packages of most artifact stores are optional.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from arplus.errors import redact

Event = dict[str, Any]
"""One thing that was logged; a line of the record. It holds ``run_id``, ``timestamp`` (milliseconds) and one of:
``key, value, step`` (a metric; with ``repeats`` where a step may have several points), ``tag, value``,
``artifact, text``, ``artifact, file``, ``dataset``, ``status``."""

Refused = list[tuple[Event, Exception]]
"""Events that a server will not take, each with the reason."""

_PASSING_STATUS = frozenset({408, 425, 429})
_PASSING_CODES = frozenset(
    {
        *("ABORTED", "CANCELLED", "RESOURCE_CONFLICT"),  # MLflow's, whose HTTP status says otherwise
        *("BandwidthLimitExceeded", "OperationAborted", "PriorRequestNotComplete", "RequestLimitExceeded"),  # S3's
        *("RequestThrottled", "RequestThrottledException", "RequestTimeout", "RequestTimeoutException", "SlowDown"),
        *("Throttling", "ThrottlingException", "ThrottledException", "TooManyRequests", "TooManyRequestsException"),
    }
)
"""Of errors whose HTTP status is that of a wrong request."""
_FINAL_CODES = frozenset({"INVALID_STATE"})
"""Of errors whose HTTP status is that of a server in trouble."""
_CREDENTIALS = re.compile(
    "Credential|AuthToken|TokenProvider|TokenLoad|TokenRetrieval|SSOError|LoginError|ProfileNotFound|ClientAuthentication"
    "|AccessDenied|AccessKey|Signature|ExpiredToken|InvalidToken|TokenRefreshRequired|AccountProblem|NotSignedUp"
)
"""In the code of an error or in the name of its type: there are no credentials, or they are wrong."""
_FINAL_TYPES = frozenset({"InvalidURL", "MissingSchema", "InvalidSchema", "InvalidHeader", "InvalidUrlException"})
_PASSING_TYPES = frozenset(
    {
        *("ConnectionError", "Timeout", "TimeoutError", "HTTPClientError", "RequestException", "TransportError"),
        *("IncompleteReadError", "ResponseStreamingError", "ServiceRequestError", "ServiceResponseError"),
        *("ChecksumError", "MetadataRetrievalError", "CapacityNotAvailableError", "S3TransferFailedError"),
    }
)
_FINAL_FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_FINAL_PYTHON_ERRORS = (ImportError, TypeError, ValueError, ArithmeticError, NotImplementedError)
_PASSING_TEXT = re.compile("QueuePool limit|database is locked|deadlock|Please reduce your request rate", re.IGNORECASE)
_FINAL_TEXT = re.compile("CERTIFICATE_VERIFY_FAILED|Could not find a registered artifact repository")
_DELETED_TEXT = re.compile("must be in the 'active' state")
"""MLflow says so, as of a wrong value, of a run that was deleted, or whose experiment was."""
_PAGE = re.compile(r"<!doctype html|<html", re.IGNORECASE)
_TAG = re.compile(r"<(style|script|head)\b.*?</\1>|<!--.*?-->|</?[a-z!][^>]*>?", re.IGNORECASE | re.DOTALL)
_STATUS_TEXT = re.compile(r"failed with error code (\d{3})")


def is_final(error: BaseException) -> bool:
    """Whether the same request would fail again, however long one waits: the module's rule."""
    return next((found for e in _chain(error) if (found := _verdict(e)) is not None), False)


def send_each(events: list[Event], send: Callable[[list[Event]], object]) -> Refused:
    """Sends events, and gives those that are refused; one that is wrong takes no other of its batch with it.

    Raises what may pass. Sending again what was sent changes nothing.
    """
    try:
        send(events)
    except Exception as error:
        if not is_final(error):
            raise
        if len(events) == 1 or not (status_of(error) in (400, 413, 422) or isinstance(error, _FINAL_PYTHON_ERRORS)):
            return [(event, error) for event in events]
    else:
        return []
    half = len(events) // 2
    return send_each(events[:half], send) + send_each(events[half:], send)


def status_of(error: BaseException) -> int | None:
    """The HTTP status that an error is about; None where it does not say."""
    return next((found for e in _chain(error) if (found := _status(e)) is not None), None)


def kind_of(error: BaseException) -> str:
    """What an error has in common with others of its kind: an HTTP status, an error's code, or the name of its type."""
    if (status := status_of(error)) is not None:
        return f"HTTP {status}"
    return next((code for e in _chain(error) if (code := _code(e)) not in ("", "INTERNAL_ERROR")), type(error).__name__)


def advice(error: BaseException) -> str:
    """What to do about a final error."""
    if any(_CREDENTIALS.search(f"{_code(e)} {_names(e)}") for e in _chain(error)):
        return (
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or what the artifact store takes) for the job and its "
            "workers, or let the server pass artifacts on (mlflow server --serve-artifacts)"
        )
    if any(isinstance(e, ImportError) for e in _chain(error)):
        return "install the package of the experiment's artifact store, or let the server pass artifacts on"
    if any(isinstance(e, _FINAL_FILE_ERRORS) for e in _chain(error)):
        return (
            "the file must stay where it is and be readable; where it is the artifact store's folder, it is on the "
            "server's machine: let the server pass artifacts on (mlflow server --serve-artifacts)"
        )
    if any("CERTIFICATE_VERIFY_FAILED" in str(e) for e in _chain(error)):
        return "set REQUESTS_CA_BUNDLE or AWS_CA_BUNDLE to the certificates of your authority"
    known = {
        401: "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, to what it takes",
        403: "ask whoever runs it for the right to write there",
        404: "the run, the experiment, or the folder or bucket of its artifacts is gone: restore it",
        413: "raise the limit on requests of the proxy before it (nginx: client_max_body_size)",
    }
    return known.get(status_of(error) or 0, "see the server's log")


def brief(error: BaseException) -> str:
    """The start of an error's message, on one line, without a password, and of a proxy's page the words alone."""
    text = redact(str(error))
    if _PAGE.search(text):
        text = _TAG.sub(" ", text)
    text = " ".join(text.split()) or type(error).__name__
    return text if len(text) <= 300 else text[:299] + "…"


def title(event: Event) -> str:
    """An event in words."""
    if "key" in event:
        return f"metric {event['key']}"
    if "tag" in event:
        return f"tag {event['tag']}"
    if "dataset" in event:
        return f"data set {event['dataset']['name']}"
    return f"status {event['status']}" if "status" in event else f"artifact {artifact_path(event)}"


def titles(events: list[Event], most: int = 6) -> str:
    """Some of the events in words, those of one name once."""
    names = list(dict.fromkeys(map(title, events)))
    return ", ".join([*names[:most], *([f"{len(names) - most} more"] if len(names) > most else [])])


def artifact_path(event: Event) -> str:
    """The path of an artifact within its run."""
    if "text" in event:
        return str(event["artifact"])
    return "/".join(filter(None, (event["artifact"], Path(event["file"]).name)))


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An error and those that it came of, the last one first."""
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        yield found
        seen.add(id(found))
        found = found.__cause__ or (None if found.__suppress_context__ else found.__context__)


def _verdict(error: BaseException) -> bool | None:
    """Whether an error by itself is final; None where it does not say."""
    text, code, status, names = str(error), _code(error), _status(error), set(_names(error).split())
    if _FINAL_TEXT.search(text):
        return True
    if code in _PASSING_CODES or _PASSING_TEXT.search(text):
        return False
    if code in _FINAL_CODES or _CREDENTIALS.search(f"{code} {' '.join(names)}"):
        return True
    if status is not None and status >= 300:
        return status not in _PASSING_STATUS and (status < 500 or status in (501, 505))
    if "RestException" in names and code != "INTERNAL_ERROR":
        return True  # a proxy's answer in JSON; MLflow's client retries, and raises otherwise, what may pass
    if isinstance(error, _FINAL_FILE_ERRORS) or names & _FINAL_TYPES:
        return True
    if names & _PASSING_TYPES:
        return False
    return True if isinstance(error, _FINAL_PYTHON_ERRORS) or "BotoCoreError" in names else None


def _names(error: BaseException) -> str:
    """The names of an error's types."""
    return " ".join(c.__name__ for c in type(error).__mro__)


def _code(error: BaseException) -> str:
    """The code that MLflow or S3 gave; empty where there is none."""
    answer = getattr(error, "json", None)
    if isinstance(answer, dict):  # RestException takes a proxy's answer without a code for an error of the server
        return str(answer.get("error_code") or "")
    response = getattr(error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else getattr(error, "error_code", None)
    return code if isinstance(code, str) else ""


def _status(error: BaseException) -> int | None:
    if _DELETED_TEXT.search(str(error)):
        return 404
    answer, response = getattr(error, "json", None), getattr(error, "response", None)
    known: list[Any] = [getattr(response, "status_code", None), getattr(error, "status_code", None)]
    if isinstance(response, dict):
        known += [response.get("ResponseMetadata", {}).get("HTTPStatusCode"), response.get("Error", {}).get("Code")]
    if isinstance(answer, dict):
        known += [answer.get(key) for key in ("error_code", "status", "statusCode", "status_code", "code")]
    if found := _STATUS_TEXT.search(str(error)):
        known.append(found[1])
    if (code := _code(error)) not in ("", "INTERNAL_ERROR") and code == getattr(error, "error_code", None):
        known.append(error.get_http_status_code())  # type: ignore[attr-defined]
    known.append(getattr(error, "code", None))  # Google's, and urllib's
    numbers = (int(n) for n in known if isinstance(n, int) or (isinstance(n, str) and n.isdecimal()))
    return next((n for n in numbers if 300 <= n < 600), None)
