"""How S3 is reached: one reading of AWS's settings and keys for both clients, pyarrow's file system and boto3's.

botocore reads them, from the environment and from the profile in AWS's own files, and finds the keys by AWS's usual
chain: it knows profiles that take a role (``role_arn``), which pyarrow does not. Keys that expire are renewed by it at
the next use, and none is pickled.
"""

import functools
import logging
import os
import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from arplus.errors import RefusedError, UsageError, mask, redact, server_problem

SETTINGS = (
    "AWS_ENDPOINT_URL, AWS_REGION, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or the profile that "
    "AWS_PROFILE names"
)
"""What decides how S3 is reached, for messages."""

_CONNECT_S = 10


@dataclass(frozen=True)
class Connection:
    """Where S3 is, and the way there."""

    endpoint: str | None
    """Of a store that is not AWS's; with its scheme."""
    region: str | None
    """None where nothing names one, which leaves it to what AWS's machines know of themselves."""
    ca_bundle: str | None
    """A file of certificates to trust instead of the usual ones."""
    addressing_style: str
    """``virtual`` (the bucket is in the host's name), ``path``, or ``auto``: ``path`` with an endpoint of one's own."""
    proxy: str | None
    """URL of the proxy to take, if any."""


def find_connection() -> Connection:
    """Reads the settings. Raises :class:`UsageError` for one that cannot be: it names it, and shows no password."""
    return _find_connection(_settings(), os.getpid())


def file_system(*, background_writes: bool = True) -> fs.S3FileSystem:
    """Pyarrow's client, as settings and keys are at this moment: for use at once. See :func:`lasting_file_system`."""
    settings, process = _settings(), os.getpid()
    return _file_system(settings, process, _find_keys(settings, process), background_writes)


def lasting_file_system() -> fs.PyFileSystem:
    """The same for what keeps or pickles it: it takes the keys of the moment whenever it is used, and holds none."""
    return fs.PyFileSystem(_Lasting())


def client() -> Any:
    """boto3's client, for conditional writes, which pyarrow has not."""
    return _client(_settings(), os.getpid())


# Of all below, one for all threads of a process, until its settings change: a fork cannot use its parent's, and each
# new one asks the machine for keys again, a good many requests for reading one file.

_Settings = tuple[tuple[str, str], ...]
_Keys = tuple[str, str, str | None]
_lock = threading.Lock()


def _settings() -> _Settings:
    """All that decides how S3 is reached: variables, and when AWS's own files were written, as keys in them expire."""
    variables = ("HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
    found = [item for item in os.environ.items() if item[0].startswith("AWS_") or item[0].upper() in variables]
    for variable, usual in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        file = Path(os.environ.get(variable) or f"~/.aws/{usual}")
        try:
            found.append((variable, str(file.expanduser().stat().st_mtime_ns)))
        except (OSError, RuntimeError):  # there is none, or no home
            continue
    return tuple(sorted(found))


@functools.lru_cache(maxsize=8)
def _session(settings: _Settings, process: int) -> Any:
    import botocore.session

    logging.getLogger("botocore").setLevel(logging.WARNING)  # it tells where it found which variable
    return botocore.session.get_session()


@functools.lru_cache(maxsize=8)
def _find_connection(settings: _Settings, process: int) -> Connection:
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError
    from botocore.utils import get_environ_proxies

    session = _session(settings, process)
    try:
        profile = session.get_scoped_config()
        ignored = session.get_config_variable("ignore_configured_endpoint_urls")
        provider = ConfiguredEndpointProvider(full_config=session.full_config, scoped_config=profile, client_name="s3")
        endpoint = None if ignored else provider.provide()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")  # botocore does not read it
        ca_bundle = session.get_config_variable("ca_bundle")
    except BotoCoreError as error:  # no such profile, a broken file
        raise UsageError(
            f"AWS's settings: {error}; check AWS_PROFILE, AWS_CONFIG_FILE and the files they name"
        ) from None
    if endpoint is not None:
        _check_url("AWS_ENDPOINT_URL", endpoint)
    if region is not None and not re.fullmatch("[A-Za-z0-9-]{1,63}", region):
        raise UsageError(f"AWS_REGION={region}: is not a region's name; write one such as us-east-1")
    if ca_bundle is not None and not Path(ca_bundle).is_file():
        raise UsageError(f"AWS_CA_BUNDLE={ca_bundle}: no such file")
    s3 = profile.get("s3")
    style = (s3.get("addressing_style") if isinstance(s3, dict) else None) or "auto"
    if style not in ("auto", "path", "virtual"):
        raise UsageError(f"AWS's settings: addressing_style = {style}: must be auto, path or virtual")
    url = endpoint or f"https://s3.{region or 'us-east-1'}.amazonaws.com"
    scheme = url.partition(":")[0].lower()
    proxy = get_environ_proxies(url).get(scheme)
    if proxy is not None:
        proxy = proxy if "://" in proxy else f"http://{proxy}"  # as curl and botocore read it
        _check_url(f"{scheme}_proxy", proxy, may_hold_password=True)
    region = region or ("us-east-1" if endpoint else None)
    return Connection(endpoint, region, ca_bundle, style, proxy)


def _check_url(variable: str, url: str, *, may_hold_password: bool = False) -> None:
    """Raises :class:`UsageError` for what is no ``http(s)://HOST[:PORT]``, with the variable's name and no password."""
    problem = server_problem(url)
    if not problem and mask(url) != url and not may_hold_password:
        problem = "must not hold a user or password"
    if problem:
        raise UsageError(f"{variable}={mask(url)}: {problem}")


def _find_keys(settings: _Settings, process: int) -> _Keys | None:
    """The keys of this moment; None where there are none, which leaves it to pyarrow to ask the machine."""
    from botocore.exceptions import BotoCoreError, ClientError

    _find_connection(settings, process)  # its errors are the plainer ones
    try:
        with _lock:
            found = _session(settings, process).get_credentials()
        if found is None:
            return None
        keys = found.get_frozen_credentials()
    except (BotoCoreError, ClientError, OSError, ValueError) as error:  # a role, a process, a login that gives none
        raise RefusedError(
            f"AWS's keys: {redact(str(error))}; check {SETTINGS}, and log in again where it takes a login"
        ) from None
    return keys.access_key, keys.secret_key, keys.token


@functools.lru_cache(maxsize=8)
def _file_system(settings: _Settings, process: int, keys: _Keys | None, background_writes: bool) -> fs.S3FileSystem:
    access_key, secret_key, token = keys or (None, None, None)
    to = _find_connection(settings, process)
    try:
        return fs.S3FileSystem(
            access_key=access_key,
            secret_key=secret_key,
            session_token=token,
            endpoint_override=to.endpoint,
            region=to.region,
            tls_ca_file_path=to.ca_bundle,
            force_virtual_addressing=to.addressing_style == "virtual",
            proxy_options=to.proxy,
            background_writes=background_writes,
            request_timeout=60,
            connect_timeout=_CONNECT_S,
        )
    except (OSError, pa.ArrowInvalid) as error:
        raise UsageError(f"AWS's settings: {redact(str(error))}; check {SETTINGS}") from None


@functools.lru_cache(maxsize=8)
def _client(settings: _Settings, process: int) -> Any:
    from botocore.config import Config

    to = _find_connection(settings, process)
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=20,
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": to.addressing_style},
        request_checksum_calculation="when_required",  # not every store knows the headers of the others
        proxies={"http": to.proxy, "https": to.proxy} if to.proxy else {},
    )
    region = to.region or file_system().region
    with _lock:
        return _session(settings, process).create_client(
            "s3", region_name=region, endpoint_url=to.endpoint, verify=to.ca_bundle, config=config
        )


def _pass_on(method: str) -> Any:
    return lambda _, *arguments: getattr(file_system(), method)(*arguments)


class _Lasting(fs.FileSystemHandler):
    """Passes every call on to the :func:`file_system` of the moment."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Lasting)

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return "s3"

    def normalize_path(self, path: str) -> str:
        return path

    get_file_info = get_file_info_selector = _pass_on("get_file_info")
    delete_dir, delete_file = _pass_on("delete_dir"), _pass_on("delete_file")
    move, copy_file = _pass_on("move"), _pass_on("copy_file")
    open_input_file = _pass_on("open_input_file")

    def create_dir(self, path: str, recursive: bool) -> None:
        file_system().create_dir(path, recursive=recursive)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        file_system().delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("never all buckets")

    def open_input_stream(self, path: str) -> Any:
        return file_system().open_input_stream(path, compression=None)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        # Ray copies folders in threads, which may hang with writes in the background (apache/arrow#32372).
        return file_system(background_writes=False).open_output_stream(path, compression=None, metadata=metadata)

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError("S3 appends to nothing")
