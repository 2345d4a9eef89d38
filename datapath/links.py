"""Interfaces, addresses, routes and neighbours; the only user of pyroute2.

All functions block (netlink); callers use a thread.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Address


@dataclass(frozen=True, slots=True)
class VethInfo:
    """`ifindex`, `host_mac`: of the host side. `mac`: of the interface inside the namespace."""

    ifindex: int
    host_mac: bytes
    mac: bytes


def netns_exists(netns: str) -> bool:
    """`netns`: name (of `ip netns`) or absolute path, e.g. /proc/PID/ns/net."""
    raise NotImplementedError


def create_veth(
    netns: str, inner_name: str, outer_name: str, address: IPv4Address, *, mtu: int = 1500
) -> VethInfo:
    """A pair, inner side configured and up in `netns`, outer side down until `set_up`.

    NotFound: no such namespace. Conflict: a name is taken. Nothing is left behind on failure.
    """
    raise NotImplementedError


def set_up(outer_name: str) -> None:
    raise NotImplementedError


def delete_veth(outer_name: str) -> bool:
    """False: it was not there."""
    raise NotImplementedError


def list_outer(prefix: str) -> dict[str, int]:
    """Interfaces of this namespace whose name starts with `prefix`, with their ifindex."""
    raise NotImplementedError


def node_addresses() -> tuple[IPv4Address, ...]:
    """This node's own IPv4 addresses, loopback excluded, primary first."""
    raise NotImplementedError


def ensure_forwarding() -> None:
    """net.ipv4.ip_forward = 1."""
    raise NotImplementedError
