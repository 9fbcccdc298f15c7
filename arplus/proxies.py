"""Which addresses are asked past the user's proxies: this machine's and the cluster's, which no proxy can reach."""

import os
import socket
from collections.abc import Iterable

import psutil

VARIABLES = ("NO_PROXY", "no_proxy")
"""What programs read, some the one and some the other."""
_GRPC = "no_grpc_proxy"
_OWN = ("localhost", "127.0.0.1", "::1", "127.0.0.0/8", "169.254.169.254", "metadata.google.internal")
"""The loopback, and what tells a machine in a cloud about itself, its keys included."""


def bypass(hosts: Iterable[str] = ()) -> None:
    """Makes this process, and those that it starts, ask ``hosts`` and this machine past any proxy.

    What the user has set is kept. gRPC reads ``no_grpc_proxy`` and, only where that is not set, ``no_proxy``.
    """
    own = [*_OWN, *_addresses_of_this_machine(), *hosts]
    value = _joined([*_names("NO_PROXY"), *_names("no_proxy"), *own])
    os.environ |= dict.fromkeys(VARIABLES, value)
    if os.environ.get(_GRPC):
        os.environ[_GRPC] = _joined([*_names(_GRPC), *own])


def for_workers() -> dict[str, str]:
    """Variables by which a cluster's workers ask past proxies whatever this process does, and what their node says.

    Ray puts in the node's own value for ``${…}``.
    """
    value = os.environ["NO_PROXY"]
    found = dict.fromkeys(VARIABLES, value if value == "*" else f"{value},${{NO_PROXY}},${{no_proxy}}")
    return found | ({_GRPC: os.environ[_GRPC]} if os.environ.get(_GRPC) else {})


def _names(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",")]


def _joined(names: list[str]) -> str:
    """The names as one value, each once. The asterisk, which stands for all, is known only where it stands alone."""
    return "*" if "*" in names else ",".join(dict.fromkeys(filter(None, names)))


def _addresses_of_this_machine() -> list[str]:
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    families = (socket.AF_INET, socket.AF_INET6)
    return sorted({a.address.partition("%")[0] for a in found if a.family in families})
