"""Interfaces, addresses, routes and neighbours.

An endpoint's pair, seen from both ends:

    namespace                                   host
    eth0  ADDRESS/32                            OUTER  (no address, no IPv6)
      default via 169.254.1.1 onlink              ADDRESS/32 dev OUTER
      169.254.1.1 is OUTER's MAC, for good        ADDRESS is eth0's MAC, for good

Neighbours are permanent at both ends, so nothing depends on ARP and nothing can be won by forging
it. All functions block (creating takes a millisecond or two, deleting the kernel's grace periods);
callers use a thread.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path
from struct import pack, unpack_from
from typing import Final

from datapath import netlink
from datapath.netlink import Netlink, Refusal, Request, attribute, attributes
from datapath.netns import netns_exists, open_netns, run_in
from services.runtime.errors import Conflict, Invalid, NotFound, Unusable

__all__ = [
    "GATEWAY",
    "VethInfo",
    "create_veth",
    "delete_veth",
    "ensure_forwarding",
    "list_outer",
    "netns_exists",
    "node_addresses",
    "set_up",
]

GATEWAY: Final = IPv4Address("169.254.1.1")
_NAME: Final = re.compile(r"[^\s/:]{1,15}")

# Numbers of if_link.h, if_addr.h, neighbour.h, rtnetlink.h and veth.h.
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINKINFO, _IFLA_NET_NS_FD = 1, 3, 4, 18, 28
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_IFF_UP: Final = 1
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_NDA_DST, _NDA_LLADDR, _NUD_PERMANENT = 1, 2, 0x80
_RTA_DST, _RTA_OIF, _RTA_GATEWAY = 1, 4, 5
_TABLE_MAIN, _PROTO_STATIC, _TYPE_UNICAST, _ONLINK = 254, 4, 1, 4
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST = 0, 253, 254


@dataclass(frozen=True, slots=True)
class VethInfo:
    """`ifindex`, `host_mac`: of the host side. `mac`: of the interface inside the namespace."""

    ifindex: int
    host_mac: bytes
    mac: bytes


@contextmanager
def _asking(what: str) -> Iterator[Netlink]:
    """`what`: the sentence a refusal begins with."""
    try:
        with Netlink() as kernel:
            yield kernel
    except OSError as error:
        if error.errno == errno.EPERM:
            raise Unusable(f"{what}: {error.strerror}: run as root (CAP_NET_ADMIN)") from error
        if error.errno == errno.ENODEV:
            raise NotFound(f"{what}: {error.strerror}") from error
        raise Unusable(f"{what}: {error.strerror}") from error


def _link(index: int = 0, *, up: bool = False) -> bytes:
    return pack("=BxHiII", socket.AF_UNSPEC, 0, index, _IFF_UP if up else 0, _IFF_UP if up else 0)


def _up(index: int) -> Request:
    return Request(netlink.NEWLINK, _link(index, up=True))


def _text(kind: int, value: str) -> bytes:
    return attribute(kind, value.encode() + b"\0")


def _word(kind: int, value: int) -> bytes:
    return attribute(kind, pack("=I", value))


def _neighbour(index: int, address: IPv4Address, mac: bytes) -> Request:
    head = pack("=BxxxiHBB", socket.AF_INET, index, _NUD_PERMANENT, 0, 0)
    body = head + attribute(_NDA_DST, address.packed) + attribute(_NDA_LLADDR, mac)
    return Request(netlink.NEWNEIGH, body, netlink.CREATE | netlink.REPLACE)


def _route(length: int, scope: int, flags: int) -> bytes:
    return pack(
        "=8BI",
        *(socket.AF_INET, length, 0, 0, _TABLE_MAIN, _PROTO_STATIC, scope, _TYPE_UNICAST),
        flags,
    )


def _random_mac() -> bytes:
    """Locally administered. Chosen here so that udev has no reason to choose another."""
    return b"\x02" + os.urandom(5)


def ifindex_of(name: str) -> int:
    """0: no such interface in this namespace."""
    try:
        return socket.if_nametoindex(name)  # not sysfs, which shows its mounter's namespace
    except OSError:
        return 0


def create_veth(
    netns: str, inner_name: str, outer_name: str, address: IPv4Address, *, mtu: int = 1500
) -> VethInfo:
    """A pair, inner side configured and up in `netns`, outer side down until `set_up`.

    NotFound: no such namespace. Conflict: a name is taken. Nothing is left behind on failure.
    """
    for name in (inner_name, outer_name):
        if not _NAME.fullmatch(name) or name in (".", ".."):
            raise Invalid(f"{name!r} is no interface name: 1 to 15 characters, no space, / or :")
    target = open_netns(netns)
    try:
        info = _create_pair(netns, target, inner_name, outer_name, mtu)
        try:
            run_in(target, lambda: _configure_inner(netns, inner_name, address, info))
            _configure_outer(outer_name)
        except BaseException:
            delete_veth(outer_name)
            raise
    finally:
        os.close(target)
    return info


def _create_pair(netns: str, target: int, inner: str, outer: str, mtu: int) -> VethInfo:
    host_mac, mac = _random_mac(), _random_mac()
    with _asking(f"cannot create interface {inner} in {netns}") as kernel:
        peer = _side(inner, mac, mtu) + _word(_IFLA_NET_NS_FD, target)
        kind = _text(_INFO_KIND, "veth") + attribute(_INFO_DATA, attribute(_VETH_PEER, peer))
        body = _side(outer, host_mac, mtu) + attribute(_IFLA_LINKINFO, kind)
        try:
            kernel.ask(Request(netlink.NEWLINK, body, netlink.CREATE | netlink.EXCL))
        except Refusal as error:
            if error.errno != errno.EEXIST:
                raise
            if ifindex_of(outer):
                raise Conflict(
                    f"interface {outer} exists already on this host: delete it (ip link del "
                    f"{outer}) if no endpoint uses it"
                ) from None
            raise Conflict(
                f"namespace {netns} has an interface {inner} already: delete it there or name "
                f"another one"
            ) from None
        return VethInfo(ifindex_of(outer), host_mac, mac)


def _side(name: str, mac: bytes, mtu: int) -> bytes:
    named = _text(_IFLA_IFNAME, name)
    return _link() + named + attribute(_IFLA_ADDRESS, mac) + _word(_IFLA_MTU, mtu)


def _configure_inner(netns: str, name: str, address: IPv4Address, info: VethInfo) -> None:
    with _asking(f"cannot configure {name} in {netns}") as kernel:
        index = ifindex_of(name)
        head = pack("=BBBBI", socket.AF_INET, 32, 0, _SCOPE_UNIVERSE, index)
        own = attribute(_IFA_LOCAL, address.packed) + attribute(_IFA_ADDRESS, address.packed)
        gateway = attribute(_RTA_GATEWAY, GATEWAY.packed) + _word(_RTA_OIF, index)
        new = netlink.CREATE | netlink.EXCL
        requests = (
            _up(ifindex_of("lo")),
            Request(netlink.NEWADDR, head + own, new),
            _up(index),
            _neighbour(index, GATEWAY, info.host_mac),
            Request(netlink.NEWROUTE, _route(0, _SCOPE_UNIVERSE, _ONLINK) + gateway, new),
        )
        try:
            kernel.ask(*requests)
        except Refusal as error:
            if error.errno == errno.EEXIST and error.at == len(requests) - 1:
                raise Conflict(
                    f"namespace {netns} has a default route already: remove it (ip route del "
                    f"default) and add the endpoint again"
                ) from None
            raise


def _configure_outer(name: str) -> None:
    # No IPv6: the programs would drop it. No reverse path filter: they judge the source.
    for path, value in (
        (f"ipv6/conf/{name}/disable_ipv6", "1"),
        (f"ipv4/conf/{name}/rp_filter", "0"),
        (f"ipv4/conf/{name}/forwarding", "1"),
    ):
        _sysctl(path, value)


def _sysctl(path: str, value: str) -> None:
    try:
        Path("/proc/sys/net", path).write_text(value)
    except FileNotFoundError:  # a kernel without IPv6 has nothing to switch off
        if not path.startswith("ipv6/"):
            raise
    except OSError as error:
        key = "net." + path.replace("/", ".")
        raise Unusable(f"cannot set {key}={value}: {error.strerror}") from error


def set_up(outer_name: str, address: IPv4Address, mac: bytes) -> None:
    """Gives the pair its carrier and the host its way to `address` behind `mac`. Idempotent.

    The kernel takes no route through an interface that is down, hence here and not in create_veth.
    """
    with _asking(f"cannot set {outer_name} up") as kernel:
        index = ifindex_of(outer_name)
        if not index:
            raise NotFound(f"cannot set {outer_name} up: no such interface")
        to = _route(32, _SCOPE_LINK, 0) + attribute(_RTA_DST, address.packed)
        kernel.ask(
            _up(index),
            _neighbour(index, address, mac),
            Request(
                netlink.NEWROUTE, to + _word(_RTA_OIF, index), netlink.CREATE | netlink.REPLACE
            ),
        )


def delete_veth(outer_name: str) -> bool:
    """Both sides, with their routes. False: it was not there."""
    try:
        with _asking(f"cannot delete {outer_name}") as kernel:
            kernel.ask(Request(netlink.DELLINK, _link() + _text(_IFLA_IFNAME, outer_name)))
    except NotFound:
        return False
    return True


def list_outer(prefix: str) -> dict[str, int]:
    """Interfaces of the current namespace whose name starts with `prefix`, with their ifindex."""
    return {name: index for index, name in socket.if_nameindex() if name.startswith(prefix)}


def node_addresses() -> tuple[IPv4Address, ...]:
    """The node's own IPv4 addresses without loopback, the default route's device first."""
    family = bytes([socket.AF_INET])
    with _asking("cannot read the node's addresses") as kernel:
        routes = kernel.dump(netlink.GETROUTE, family + bytes(11))
        addresses = kernel.dump(netlink.GETADDR, family + bytes(7))
    uplinks = set[int]()
    for route in routes:
        oif = attributes(route[12:]).get(_RTA_OIF)
        if oif and (route[1], route[4]) == (0, _TABLE_MAIN):
            uplinks.add(unpack_from("=I", oif)[0])
    rows = []
    for row in addresses:
        _, _, _, scope, index = unpack_from("=BBBBI", row)
        local = attributes(row[8:]).get(_IFA_LOCAL)
        if local and scope != _SCOPE_HOST:
            rows.append((index not in uplinks, index, IPv4Address(local)))
    return tuple(dict.fromkeys(address for _, _, address in sorted(rows)))


def ensure_forwarding() -> None:
    """net.ipv4.ip_forward = 1, written only where it is not: the write resets other sysctls."""
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "1":
        _sysctl("ipv4/ip_forward", "1")
