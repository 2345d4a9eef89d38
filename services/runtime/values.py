"""What a configuration's types cannot say.

Each refusal is a ValueError, which msgspec makes part of its ValidationError; its words begin with
the key.
"""

from __future__ import annotations

from typing import Final

_PORT_MAX: Final = 65535


def check(holds: bool, message: str) -> None:  # noqa: FBT001  an assertion with words for the operator
    if not holds:
        raise ValueError(message)


def is_host_port(text: str) -> bool:
    host, _, port = text.rpartition(":")
    return bool(host.strip("[]:")) and port.isdecimal() and int(port) <= _PORT_MAX


def check_listeners(listen: str, metrics_listen: str) -> None:
    """Either may be empty here; an empty `listen` is refused where it is bound."""
    if listen and not listen.startswith("unix:"):
        check(is_host_port(listen), f"listen: {listen!r} is neither host:port nor unix:///path")
    if metrics_listen:
        check(is_host_port(metrics_listen), f"metrics_listen: {metrics_listen!r} is not host:port")
