"""Routes to the endpoints of other nodes, in the main table, told apart from everybody else's.

    10.244.3.7 via 192.0.2.12 dev eth0 proto 116 metric M      or, tunnelled, dev <overlay>

`proto` says that a Tessera agent made it, the metric which one's it is: several nodes may share a
machine. Routes outlive the agent, like everything that packets of established endpoints need.
Second user of pyroute2 beside links.py; every function blocks.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Mapping
from hashlib import blake2b
from ipaddress import ip_address
from typing import Any, Final

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

PROTOCOL: Final = 116  # rtnetlink(7): above RTPROT_STATIC, an administrator's to give
_MAIN_TABLE: Final = 254
_FIRST_METRIC: Final = 0x74000000
_FAMILIES: Final = {4: socket.AF_INET, 6: socket.AF_INET6}


def metric_of(node: str) -> int:
    """The same for the same node name, another for another one's."""
    return _FIRST_METRIC | int.from_bytes(blake2b(node.encode(), digest_size=3).digest(), "big")


class Router:
    """Destinations and gateways are addresses as text; every route is to one address."""

    def __init__(self, node: str, device: int = 0) -> None:
        """`device`: the overlay's, which all routes lead into; gateways are only remembered."""
        self._metric = metric_of(node)
        self._device = device

    def held(self) -> dict[str, str]:
        """Destination -> gateway of the routes that are this node's."""
        found = {}
        with IPRoute() as netlink:
            for family in _FAMILIES.values():
                for route in netlink.get_routes(
                    family=family, table=_MAIN_TABLE, proto=PROTOCOL, priority=self._metric
                ):
                    # A kernel before 5.x does not filter what it dumps.
                    if (route["proto"], route.get("priority")) == (PROTOCOL, self._metric):
                        found[route.get("dst")] = route.get("gateway") or ""
        return found

    def put(self, routes: Mapping[str, str]) -> dict[str, str]:
        """Destination -> reason of those the kernel refused; what was there before is there."""
        refused = {}
        with IPRoute() as netlink:
            for destination, gateway in routes.items():
                try:
                    way = {"oif": self._device} if self._device else {"gateway": gateway}
                    netlink.route("replace", **way, **self._named(destination))
                except NetlinkError as error:
                    refused[destination] = os.strerror(error.code)
        return refused

    def drop(self, destinations: Iterable[str]) -> None:
        """No error for one that is not there."""
        with IPRoute() as netlink:
            for destination in destinations:
                try:
                    netlink.route("del", **self._named(destination))
                except NetlinkError as error:
                    if error.code not in (errno.ESRCH, errno.ENODEV):
                        raise

    def _named(self, destination: str) -> dict[str, Any]:
        address = ip_address(destination)
        return {
            "dst": f"{destination}/{address.max_prefixlen}",
            "family": _FAMILIES[address.version],
            "table": _MAIN_TABLE,
            "proto": PROTOCOL,
            "priority": self._metric,
        }
