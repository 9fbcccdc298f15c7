"""How S3 is reached: one reading of AWS's settings for both clients, pyarrow's file system and boto3's.

botocore reads them, from the environment and from the profile in AWS's own files. Keys are each client's to find, by
AWS's usual chain in both: keys that expire are renewed there, and none is held or pickled here.
"""

import functools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyarrow import fs

from arplus.errors import UserError, masked

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
    """Reads the settings. Raises :class:`UserError` for one that cannot be: it names it, and shows no password."""
    import botocore.session
    from botocore.configprovider import ConfiguredEndpointProvider
    from botocore.exceptions import BotoCoreError
    from botocore.utils import get_environ_proxies

    logging.getLogger("botocore").setLevel(logging.WARNING)  # it says where it has found each setting
    session = botocore.session.get_session()
    try:
        profile = session.get_scoped_config()
        ignored = session.get_config_variable("ignore_configured_endpoint_urls")
        provider = ConfiguredEndpointProvider(full_config=session.full_config, scoped_config=profile, client_name="s3")
        endpoint = None if ignored else provider.provide()
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region")  # botocore does not read it
        ca_bundle = session.get_config_variable("ca_bundle")
    except BotoCoreError as error:  # no such profile, a broken file
        raise UserError(
            f"AWS's settings: {error}; check AWS_PROFILE, AWS_CONFIG_FILE and the files they name"
        ) from None
    if endpoint is not None and not endpoint.lower().startswith(("http://", "https://")):
        raise UserError(f"AWS_ENDPOINT_URL={masked(endpoint)}: must begin with http:// or https://")
    if endpoint is not None and masked(endpoint) != endpoint:
        raise UserError(f"AWS_ENDPOINT_URL={masked(endpoint)}: must not hold a user or password")
    if ca_bundle is not None and not Path(ca_bundle).is_file():
        raise UserError(f"AWS_CA_BUNDLE={ca_bundle}: no such file")
    url = endpoint or f"https://s3.{region or 'us-east-1'}.amazonaws.com"
    s3 = profile.get("s3")
    return Connection(
        endpoint=endpoint,
        region=region or ("us-east-1" if endpoint else None),
        ca_bundle=ca_bundle,
        addressing_style=(s3.get("addressing_style") if isinstance(s3, dict) else None) or "auto",
        proxy=get_environ_proxies(url).get(url.partition(":")[0].lower()),
    )


def file_system() -> fs.S3FileSystem:
    """Pyarrow's client, as the settings of this moment say."""
    variables = ("HOME", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "ALL_PROXY")
    settings = sorted(item for item in os.environ.items() if item[0].startswith("AWS_") or item[0].upper() in variables)
    return _file_system(tuple(settings), os.getpid())


@functools.lru_cache(maxsize=8)
def _file_system(settings: tuple[tuple[str, str], ...], process: int) -> fs.S3FileSystem:
    """For all threads of a ``process``: a fork cannot use its parent's.

    One for all calls: each new one asks the machine for credentials again, a good many requests for reading one file.
    """
    to = find_connection()
    return fs.S3FileSystem(
        endpoint_override=to.endpoint,
        region=to.region,
        tls_ca_file_path=to.ca_bundle,
        force_virtual_addressing=to.addressing_style == "virtual",
        proxy_options=to.proxy,
        request_timeout=60,
        connect_timeout=_CONNECT_S,
    )


def client() -> Any:
    """boto3's client, for conditional writes, which pyarrow has not."""
    import botocore.session
    from botocore.config import Config

    to = find_connection()
    config = Config(
        connect_timeout=_CONNECT_S,
        read_timeout=20,
        retries={"mode": "standard", "total_max_attempts": 3},
        s3={"addressing_style": to.addressing_style},
        proxies={"http": to.proxy, "https": to.proxy} if to.proxy else {},
    )
    region = to.region or file_system().region
    return botocore.session.get_session().create_client(
        "s3", region_name=region, endpoint_url=to.endpoint, verify=to.ca_bundle, config=config
    )
