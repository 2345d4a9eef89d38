"""Interfaces, addresses, routes and neighbours of endpoints; with routes.py the user of pyroute2.

An endpoint's pair, seen from both ends:

    namespace                                   host
    eth0  ADDRESS/32                            OUTER  (no address)
      default via 169.254.1.1 onlink              ADDRESS/32 dev OUTER
      169.254.1.1 is OUTER's MAC, for good        ADDRESS is eth0's MAC, for good

and for IPv6, where the endpoint has it, the same with /128 and fe80::1; without, OUTER has none.

Neighbours are permanent at both ends, so nothing depends on ARP and nothing can be won by forging
it. All functions block (creating takes a few milliseconds, deleting the kernel's grace periods);
callers use a thread. Names are resolved by if_nametoindex(3): a look-up over netlink is a dump.
"""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_interface
from pathlib import Path
from typing import Any, Final

from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink.exceptions import NetlinkError

from datapath.netns import netns_exists, open_netns, run_in
from services.runtime.errors import Conflict, Invalid, NotFound, Unusable

__all__ = [
    "DEFAULT_ROUTE",
    "GATEWAY",
    "INTERFACE_NAME",
    "MTU",
    "Existing",
    "Inside",
    "VethInfo",
    "create_veth",
    "delete_veth",
    "ensure_forwarding",
    "find_veth",
    "has_carrier",
    "list_outer",
    "look_inside",
    "netns_exists",
    "node_addresses",
    "node_networks",
    "set_up",
]

GATEWAY: Final = IPv4Address("169.254.1.1")
GATEWAY6: Final = IPv6Address("fe80::1")
DEFAULT_ROUTE: Final = "0.0.0.0/0"
DEFAULT_ROUTE6: Final = "::/0"
MTU: Final = 1500
INTERFACE_NAME: Final = re.compile(r"[^\s/:]{1,15}")

_IFF_UP: Final = 1
_NUD_PERMANENT: Final = 0x80
_SCOPE_HOST: Final = 254
_SCOPE_LINK: Final = 253
_MAIN_TABLE: Final = 254


@dataclass(frozen=True, slots=True)
class VethInfo:
    """`ifindex`, `host_mac`: of the host side. `mac`: of the interface inside the namespace."""

    ifindex: int
    host_mac: bytes
    mac: bytes


@dataclass(frozen=True, slots=True)
class Inside:
    """An interface of a namespace as found. `addresses`: with prefix length. `routes`: the CIDRs of
    the main table that lead through it to a gateway."""

    mac: bytes
    up: bool
    addresses: frozenset[str]
    routes: frozenset[str]


@dataclass(frozen=True, slots=True)
class Existing:
    """A pair somebody else made: its host side, and what is inside."""

    outer: str
    ifindex: int
    host_mac: bytes
    mac: bytes
    address: IPv4Address


@contextmanager
def _netlink(what: str) -> Iterator[Any]:
    """`what`: the sentence a refusal begins with."""
    try:
        with IPRoute() as netlink:
            yield netlink
    except NetlinkError as error:
        reason = os.strerror(error.code)
        if error.code == errno.EPERM:
            raise Unusable(f"{what}: {reason}: run as root (CAP_NET_ADMIN)") from error
        if error.code == errno.ENODEV:
            raise NotFound(f"{what}: {reason}") from error
        raise Unusable(f"{what}: {reason}") from error


def _random_mac() -> bytes:
    """Locally administered. Chosen here so that udev has no reason to choose another."""
    return b"\x02" + os.urandom(5)


def _spelled(mac: bytes) -> str:
    return mac.hex(":")


def ifindex_of(name: str) -> int:
    """0: no such interface in this namespace."""
    try:
        return socket.if_nametoindex(name)  # not sysfs, which shows its mounter's namespace
    except OSError:
        return 0


def create_veth(
    netns: str,
    inner_name: str,
    outer_name: str,
    address: IPv4Address,
    *,
    address6: IPv6Address | None = None,
    mtu: int = MTU,
    routes: Sequence[str] = (),
    mac: bytes | None = None,
) -> VethInfo:
    """A pair, inner side configured and up in `netns`, outer side down until `set_up`. `routes`:
    CIDRs that the namespace reaches through it; none: everything its addresses can speak to. `mac`:
    of the inner side; None: a random one.

    NotFound: no such namespace. Conflict: a name is taken. Nothing is left behind on failure.
    """
    for name in (inner_name, outer_name):
        if not INTERFACE_NAME.fullmatch(name) or name in (".", ".."):
            raise Invalid(f"{name!r} is no interface name: 1 to 15 characters, no space, / or :")
    target = open_netns(netns)
    try:
        info = _create_pair(netns, target, inner_name, outer_name, mtu, mac or _random_mac())
        try:
            run_in(
                target,
                lambda: _configure_inner(netns, inner_name, (address, address6), info, routes),
            )
            _configure_outer(outer_name, ipv6=address6 is not None)
        except BaseException:
            delete_veth(outer_name)
            raise
    finally:
        os.close(target)
    return info


def _create_pair(netns: str, target: int, inner: str, outer: str, mtu: int, mac: bytes) -> VethInfo:
    host_mac = _random_mac()
    peer = {"ifname": inner, "net_ns_fd": target, "address": _spelled(mac), "mtu": mtu}
    with _netlink(f"cannot create interface {inner} in {netns}") as netlink:
        try:
            netlink.link(
                "add",
                ifname=outer,
                kind="veth",
                address=_spelled(host_mac),
                mtu=mtu,
                peer=peer,
            )
        except NetlinkError as error:
            if error.code != errno.EEXIST:
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


def _configure_inner(
    netns: str,
    name: str,
    addresses: tuple[IPv4Address, IPv6Address | None],
    info: VethInfo,
    routes: Sequence[str],
) -> None:
    address, address6 = addresses
    with _netlink(f"cannot configure {name} in {netns}") as netlink:
        index = ifindex_of(name)
        netlink.link("set", index=ifindex_of("lo"), state="up")
        netlink.addr("add", index=index, address=str(address), prefixlen=32)
        if address6 is not None:
            _sysctl(f"ipv6/conf/{name}/disable_ipv6", "0")
            # Nobody else can have the address: looking for one who has would only delay its use.
            _sysctl(f"ipv6/conf/{name}/accept_dad", "0")
            netlink.addr(
                "add", index=index, address=str(address6), prefixlen=128, family=socket.AF_INET6
            )
        netlink.link("set", index=index, state="up")
        _neighbour(netlink, index, GATEWAY, info.host_mac)
        if address6 is not None:
            _neighbour(netlink, index, GATEWAY6, info.host_mac)
        every = (DEFAULT_ROUTE,) if address6 is None else (DEFAULT_ROUTE, DEFAULT_ROUTE6)
        for route in routes or every:
            if address6 is not None or ":" not in route:
                _route(netlink, netns, index, route)


def _route(netlink: Any, netns: str, index: int, dst: str) -> None:  # noqa: ANN401
    six = ":" in dst
    way: dict[str, Any] = {"gateway": str(GATEWAY6 if six else GATEWAY), "oif": index}
    way["family"] = socket.AF_INET6 if six else socket.AF_INET
    try:
        netlink.route("add", dst=dst, flags=["onlink"], **way)
    except NetlinkError as error:
        if error.code != errno.EEXIST:
            raise
        default = dst in (DEFAULT_ROUTE, DEFAULT_ROUTE6)
        which = "a default route" if default else f"a route to {dst}"
        raise Conflict(
            f"namespace {netns} has {which} already: remove it (ip route del {dst}) and add the "
            f"endpoint again"
        ) from None


def _neighbour(
    netlink: Any,  # noqa: ANN401  pyroute2 carries no types
    index: int,
    address: IPv4Address | IPv6Address,
    mac: bytes,
) -> None:
    netlink.neigh(
        "replace",
        family=socket.AF_INET6 if address.version == 6 else socket.AF_INET,
        dst=str(address),
        lladdr=_spelled(mac),
        ifindex=index,
        state=_NUD_PERMANENT,
    )


def _configure_outer(name: str, *, ipv6: bool) -> None:
    # No reverse path filter: the programs judge the source.
    for path, value in (
        (f"ipv6/conf/{name}/disable_ipv6", "0" if ipv6 else "1"),
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


def set_up(
    outer_name: str, address: IPv4Address, mac: bytes, address6: IPv6Address | None = None
) -> None:
    """Gives the pair its carrier and the host its way to the addresses behind `mac`. Idempotent.

    The kernel takes no route through an interface that is down, hence here and not in create_veth.
    """
    index = ifindex_of(outer_name)
    if not index:
        raise NotFound(f"cannot set {outer_name} up: no such interface")
    with _netlink(f"cannot set {outer_name} up") as netlink:
        netlink.link("set", index=index, state="up")
        _neighbour(netlink, index, address, mac)
        netlink.route("replace", dst=f"{address}/32", oif=index, scope="link")
        if address6 is not None:
            _neighbour(netlink, index, address6, mac)
            netlink.route("replace", dst=f"{address6}/128", oif=index, family=socket.AF_INET6)


def delete_veth(outer_name: str) -> bool:
    """Both sides, with their routes. False: it was not there."""
    index = ifindex_of(outer_name)
    if not index:
        return False
    try:
        with _netlink(f"cannot delete {outer_name}") as netlink:
            netlink.link("del", index=index)
    except NotFound:  # its namespace went away meanwhile
        return False
    return True


def find_veth(netns: str, name: str) -> Existing:
    """The pair that `name` inside `netns` is one end of. Invalid: it is none whose packets could be
    judged here, or has not one IPv4 address. NotFound: no such namespace or interface."""
    what = f"interface {name} of {netns}"
    target = open_netns(netns)
    try:
        index, peer, mac, addresses = run_in(target, lambda: _find_inside(what, name))
        with _netlink(f"cannot look for the host side of {what}") as netlink:
            there = netlink.get_netnsid(fd=target)["nsid"]
            here = {number for number, _ in socket.if_nameindex()}
            links = netlink.get_links(peer) if peer in here else ()
    finally:
        os.close(target)
    if len(addresses) != 1:
        found = ", ".join(addresses) or "none"
        raise Invalid(f"{what}: an endpoint has one IPv4 address, this has {found}")
    for link in links:
        # An index means something in one namespace only, so both must point at each other.
        if (link.get("link"), link.get("link_netnsid")) == (index, there):
            address = IPv4Address(addresses[0])
            host_mac = _packed(link.get("address"))
            return Existing(link.get("ifname"), peer, host_mac, mac, address)
    raise Invalid(f"{what} is no veth pair whose other side is on this host")


def _find_inside(what: str, name: str) -> tuple[int, int, bytes, list[str]]:
    """(ifindex, ifindex of the peer or 0, MAC, global IPv4 addresses)"""
    index = ifindex_of(name)
    if not index:
        raise NotFound(f"{what}: there is no such interface")
    with _netlink(f"cannot look at {what}") as netlink:
        (link,) = netlink.get_links(index)
        peer = link.get("link") if _kind(link) == "veth" else None
        rows = netlink.get_addr(index=index, family=socket.AF_INET)
        addresses = [row.get("address") for row in rows if row["scope"] == 0]
        return index, peer or 0, _packed(link.get("address")), addresses


def _kind(link: Any) -> str | None:  # noqa: ANN401
    info = link.get("linkinfo")
    kind: str | None = info.get("kind") if info else None
    return kind


def _packed(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def has_carrier(outer_name: str) -> bool:
    """Up at both ends."""
    index = ifindex_of(outer_name)
    if not index:
        return False
    with _netlink(f"cannot look at {outer_name}") as netlink:
        (link,) = netlink.get_links(index)
        return bool(link.get("carrier"))


def look_inside(netns: str, name: str) -> Inside | None:
    """None: no such namespace any more, or no such interface in it."""
    try:
        target = open_netns(netns)
    except NotFound:
        return None
    try:
        return run_in(target, lambda: _look_inside(netns, name))
    finally:
        os.close(target)


def _look_inside(netns: str, name: str) -> Inside | None:
    index = ifindex_of(name)
    if not index:
        return None
    with _netlink(f"cannot look at {name} in {netns}") as netlink:
        (link,) = netlink.get_links(index)
        return Inside(
            _packed(link.get("address")),
            bool(link["flags"] & _IFF_UP),
            frozenset(
                f"{row.get('address')}/{row['prefixlen']}" for row in netlink.get_addr(index=index)
            ),
            frozenset(
                _destination(row)
                for row in netlink.get_routes(table=_MAIN_TABLE)
                if row.get("oif") == index and row.get("gateway")
            ),
        )


def _destination(route: Any) -> str:  # noqa: ANN401
    if route.get("dst"):
        return f"{route.get('dst')}/{route['dst_len']}"
    return DEFAULT_ROUTE if route["family"] == socket.AF_INET else "::/0"


def list_outer(prefix: str) -> dict[str, int]:
    """Interfaces of the current namespace whose name starts with `prefix`, with their ifindex."""
    return {name: index for index, name in socket.if_nameindex() if name.startswith(prefix)}


def node_addresses6() -> tuple[IPv6Address, ...]:
    """The node's own IPv6 addresses without loopback, those of its links included."""
    with _netlink("cannot read the node's addresses") as netlink:
        rows = [
            IPv6Address(row.get("address"))
            for row in netlink.get_addr(family=socket.AF_INET6)
            if row["scope"] != _SCOPE_HOST
        ]
    return tuple(dict.fromkeys(rows))


def node_addresses() -> tuple[IPv4Address, ...]:
    """The node's own IPv4 addresses without loopback, the default route's device first."""
    with _netlink("cannot read the node's addresses") as netlink:
        uplinks = {
            route.get("oif")
            for route in netlink.get_default_routes(family=socket.AF_INET, table=_MAIN_TABLE)
        }
        rows = [
            (row["index"] not in uplinks, row["index"], IPv4Address(row.get("local")))
            for row in netlink.get_addr(family=socket.AF_INET)
            if row["scope"] != _SCOPE_HOST
        ]
    return tuple(dict.fromkeys(address for _, _, address in sorted(rows)))


def node_networks() -> tuple[str, ...]:
    """The networks that the node's interfaces are in, without loopback and link-local ones."""
    with _netlink("cannot read the node's addresses") as netlink:
        found = [
            ip_interface(f"{row.get('address')}/{row['prefixlen']}").network
            for family in (socket.AF_INET, socket.AF_INET6)
            for row in netlink.get_addr(family=family)
            if row["scope"] not in (_SCOPE_HOST, _SCOPE_LINK)
        ]
    wide = {network for network in found if network.num_addresses > 1}
    return tuple(sorted(map(str, wide)))


def ensure_forwarding() -> None:
    """Of both families; written only where it is not: the write resets other sysctls."""
    if Path("/proc/sys/net/ipv4/ip_forward").read_text().strip() != "1":
        _sysctl("ipv4/ip_forward", "1")
    six = Path("/proc/sys/net/ipv6/conf/all/forwarding")
    if six.exists() and six.read_text().strip() != "1":
        _sysctl("ipv6/conf/all/forwarding", "1")


def devices_with(address: IPv4Address) -> list[str]:
    """Interfaces that have the address."""
    with _netlink("cannot read the node's addresses") as netlink:
        rows = netlink.get_addr(family=socket.AF_INET)
        return [
            socket.if_indextoname(row["index"])
            for row in rows
            if IPv4Address(row.get("local")) == address
        ]


def mtu_of(name: str) -> int:
    with _netlink(f"cannot look at {name}") as netlink:
        (link,) = netlink.get_links(ifindex_of(name))
        return int(link.get("mtu"))


def ensure_overlay(name: str, port: int, mtu: int) -> int:
    """A VXLAN device for all peers, told by the programs whom to send to; its ifindex. One that is
    there is kept. Unusable: the port is another device's."""
    if not ifindex_of(name):
        with _netlink(f"cannot create {name}, VXLAN on port {port}") as netlink:
            netlink.link(
                "add",
                ifname=name,
                kind="vxlan",
                vxlan_collect_metadata=True,
                vxlan_port=port,
                vxlan_learning=False,
                vxlan_udp_csum=False,
                vxlan_udp_zero_csum6_rx=True,
            )
    index = ifindex_of(name)
    with _netlink(f"cannot set {name} up") as netlink:
        # The programs say where to; nobody is there to be asked for a hardware address.
        netlink.link("set", index=index, mtu=mtu, state="up", arp=False)
    _sysctl(f"ipv4/conf/{name}/rp_filter", "0")
    return index


def reserve_ports(first: int, last: int) -> None:
    """The kernel gives none of them to a socket that asks for any; others stay as reserved."""
    path = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")
    wanted, held = f"{first}-{last}", path.read_text().strip()
    if wanted not in held.split(","):
        _sysctl("ipv4/ip_local_reserved_ports", ",".join(filter(None, (held, wanted))))
