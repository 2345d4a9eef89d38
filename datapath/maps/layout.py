"""The records user space and the programs share, twin of datapath/bpf/abi.h.

Every struct of abi.h is one frozen dataclass with `pack` and `unpack`; sizes, offsets and
enumerators are compared with the built object's BTF in tests/kernel. In Python an IPv4 address is
`int(IPv4Address(...))`, an IPv6 one `int(IPv6Address(...))`, a port is its number, a MAC six bytes;
the byte order of the kernel side is dealt with here and nowhere else. Where either family may
stand (flows, events, control rows) it is IPv6 with IPv4 mapped into it: `mapped`, `plain`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from ipaddress import IPv4Address, IPv6Address
from socket import htonl, htons, ntohl, ntohs
from struct import Struct
from typing import ClassVar, Final, Generic, NamedTuple, Self, TypeVar

SLOT_OPEN: Final = 0
METRIC_LOST: Final = 510
METRIC_MAX: Final = 512


class Verdict(IntEnum):
    NONE = 0
    ALLOW = 1
    DENY = 2
    REDIRECT = 3


class EndpointFlags(IntFlag):
    """AUDIT: what policy denies is reported and passes. RESPOND: who is denied is told."""

    READY = 1
    AUDIT = 2
    RESPOND = 4


class PeerFlags(IntFlag):
    """Port rows have all but the first two. STAGED: the staged answer counts."""

    HAS_PORTS = 1
    HAS_RANGES = 2
    AUDIT = 4
    STAGED = 8
    RESPOND = 16


class EventType(IntEnum):
    DROP = 1
    TRACE = 4
    VERDICT = 5


class EventFlags(IntFlag):
    REPLY = 1
    AUDIT = 2
    STAGED = 4


class TracePoint(IntEnum):
    """Where a TRACE event saw its packet, numbered as Hubble numbers them."""

    TO_ENDPOINT = 0
    TO_HOST = 2
    TO_STACK = 3
    TO_OVERLAY = 4
    TO_NETWORK = 11


class ConfigFlags(IntFlag):
    """TRACE: connections that pass are reported, too. MASQUERADE: see NodeConfig.node_ipv4."""

    TRACE = 1
    MASQUERADE = 2


_PLAIN: Final = PeerFlags(0)


class MatchType(IntEnum):
    NONE = 0
    L3 = 1
    L3_L4 = 2
    L4 = 3
    ALL = 4
    L3_PROTO = 5
    PROTO = 6


class DropReason(IntEnum):
    INVALID_SRC_MAC = 130
    INVALID_SRC_IP = 132
    POLICY_DENIED = 133
    INVALID_PACKET = 134
    CT_INVALID_HEADER = 135
    CT_UNKNOWN_PROTO = 137
    NO_TUNNEL_KEY = 147
    NO_LOCAL_ENDPOINT = 152
    CT_INSERT_FAILED = 155
    EXTENSION_HEADER = 156
    FRAGMENT = 157
    NO_TUNNEL_ENDPOINT = 160
    NO_CONFIG = 165
    UNSUPPORTED_L2 = 166
    NAT_NO_MAPPING = 167
    NAT_UNSUPPORTED_PROTO = 168
    ENCAP_PROHIBITED = 170
    UNKNOWN_SENDER = 172
    NO_FIRST_FRAGMENT = 175
    FORBIDDEN_ICMP6 = 176
    POLICY_DENY = 181
    INVALID_VNI = 183
    EP_NOT_READY = 203
    PROXY_PUNT = 205


HOST_IFINDEX: Final = 1
"""Key of the node's own row in `endpoints`; while it is missing the host firewall is off."""

_MAPPED: Final = 0xFFFF << 32


def mapped(address: IPv4Address | IPv6Address) -> int:
    """As it stands where either family may."""
    return _MAPPED | int(address) if address.version == 4 else int(address)


def plain(address: int) -> IPv4Address | IPv6Address:
    """What `mapped` was given."""
    six = IPv6Address(address)
    return six.ipv4_mapped or six


def pack6(address: int) -> bytes:
    return address.to_bytes(16, "big")


def unpack6(data: bytes) -> int:
    return int.from_bytes(data, "big")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`mac`: of the interface inside the namespace. `host_mac`: of the host side. An address of 0:
    it has none of the family."""

    LAYOUT: ClassVar[Struct] = Struct("=6I6s6s16s")

    id: int
    identity: int
    slot_in: int
    slot_out: int
    flags: EndpointFlags
    ipv4: int
    mac: bytes
    host_mac: bytes
    ipv6: int = 0

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.id,
            self.identity,
            self.slot_in,
            self.slot_out,
            self.flags,
            htonl(self.ipv4),
            self.mac,
            self.host_mac,
            pack6(self.ipv6),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        ident, identity, slot_in, slot_out, flags, ipv4, mac, host, ipv6 = cls.LAYOUT.unpack(data)
        return cls(
            ident,
            identity,
            slot_in,
            slot_out,
            EndpointFlags(flags),
            ntohl(ipv4),
            mac,
            host,
            unpack6(ipv6),
        )


@dataclass(frozen=True, slots=True)
class LocalEndpoint:
    LAYOUT: ClassVar[Struct] = Struct("=I")

    ifindex: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.ifindex)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True, order=True)
class Prefix4:
    LAYOUT: ClassVar[Struct] = Struct("=2I")

    prefixlen: int
    addr: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.prefixlen, htonl(self.addr))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        prefixlen, addr = cls.LAYOUT.unpack(data)
        return cls(prefixlen, ntohl(addr))


@dataclass(frozen=True, slots=True, order=True)
class Prefix6:
    LAYOUT: ClassVar[Struct] = Struct("=I16s")

    prefixlen: int
    addr: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.prefixlen, pack6(self.addr))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        prefixlen, addr = cls.LAYOUT.unpack(data)
        return cls(prefixlen, unpack6(addr))


@dataclass(frozen=True, slots=True)
class Node:
    """A node whose tunnels are believed. `identity`: of the node itself, remote-node as a rule."""

    LAYOUT: ClassVar[Struct] = Struct("=I")

    identity: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.identity)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class IpcacheEntry:
    """`tunnel`: address of the node to encapsulate to; 0 = local or natively routed."""

    LAYOUT: ClassVar[Struct] = Struct("=2I")

    identity: int
    tunnel: int = 0

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.identity, htonl(self.tunnel))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        identity, tunnel = cls.LAYOUT.unpack(data)
        return cls(identity, ntohl(tunnel))


@dataclass(frozen=True, slots=True)
class PolicySlot:
    """A cached verdict is believed while it carries this revision.

    Write rows first, the revision last. A slot number used again must not go back to a revision
    it had before: connections may still carry it.
    """

    LAYOUT: ClassVar[Struct] = Struct("=I")

    revision: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.revision)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True, order=True)
class PolicyPeerKey:
    LAYOUT: ClassVar[Struct] = Struct("=2I")

    slot: int
    identity: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.slot, self.identity)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        return cls(*cls.LAYOUT.unpack(data))


@dataclass(frozen=True, slots=True)
class PolicyPeer:
    """`verdict`, `rule_id`: the answer when no port row matches. `staged`, `staged_rule_id`: what
    staged policies would answer; they count with PeerFlags.STAGED."""

    LAYOUT: ClassVar[Struct] = Struct("=2IH2BIB3x")

    class_id: int
    rule_id: int
    proxy_port: int
    verdict: Verdict
    flags: PeerFlags
    staged_rule_id: int = 0
    staged: Verdict = Verdict.NONE

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.class_id,
            self.rule_id,
            htons(self.proxy_port),
            self.verdict,
            self.flags,
            self.staged_rule_id,
            self.staged,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        class_id, rule_id, port, verdict, flags, staged_rule, staged = cls.LAYOUT.unpack(data)
        return cls(
            class_id,
            rule_id,
            ntohs(port),
            Verdict(verdict),
            PeerFlags(flags),
            staged_rule,
            Verdict(staged),
        )


@dataclass(frozen=True, slots=True, order=True)
class PolicyPortKey:
    """ICMP: `dport` is the type."""

    LAYOUT: ClassVar[Struct] = Struct("=IHBx")

    class_id: int
    dport: int
    proto: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.class_id, htons(self.dport), self.proto)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        class_id, dport, proto = cls.LAYOUT.unpack(data)
        return cls(class_id, ntohs(dport), proto)


RANGE_FIXED_BITS: Final = 40


@dataclass(frozen=True, slots=True, order=True)
class PolicyRangeKey:
    """`prefixlen`: RANGE_FIXED_BITS (class and protocol) + leading bits of `dport` that count."""

    LAYOUT: ClassVar[Struct] = Struct("=2IB2sx")

    prefixlen: int
    class_id: int
    proto: int
    dport: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.prefixlen, self.class_id, self.proto, self.dport.to_bytes(2, "big")
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        prefixlen, class_id, proto, dport = cls.LAYOUT.unpack(data)
        return cls(prefixlen, class_id, proto, int.from_bytes(dport, "big"))


@dataclass(frozen=True, slots=True)
class PolicyAnswer:
    LAYOUT: ClassVar[Struct] = Struct("=IH2BIB3x")

    rule_id: int
    proxy_port: int
    verdict: Verdict
    flags: PeerFlags = _PLAIN
    staged_rule_id: int = 0
    staged: Verdict = Verdict.NONE

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.rule_id,
            htons(self.proxy_port),
            self.verdict,
            self.flags,
            self.staged_rule_id,
            self.staged,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        rule_id, port, verdict, flags, staged_rule, staged = cls.LAYOUT.unpack(data)
        return cls(
            rule_id, ntohs(port), Verdict(verdict), PeerFlags(flags), staged_rule, Verdict(staged)
        )


@dataclass(frozen=True, slots=True, order=True)
class ControlKey:
    """What the host firewall never stops. `peer`: mapped; 0 is any. `port`: the node's with
    Direction.INGRESS, the peer's with EGRESS. The value is a rule id."""

    LAYOUT: ClassVar[Struct] = Struct("=16sH2B")

    peer: int
    port: int
    proto: int
    direction: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(pack6(self.peer), htons(self.port), self.proto, self.direction)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        peer, port, proto, direction = cls.LAYOUT.unpack(data)
        return cls(unpack6(peer), ntohs(port), proto, direction)


@dataclass(frozen=True, slots=True)
class Metric:
    LAYOUT: ClassVar[Struct] = Struct("=2Q")

    packets: int
    octets: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.packets, self.octets)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        """Sum of one record per CPU."""
        rows = list(cls.LAYOUT.iter_unpack(data))
        return cls(sum(row[0] for row in rows), sum(row[1] for row in rows))


@dataclass(frozen=True, slots=True)
class NodeConfig:
    """`node_ipv4`: also what masqueraded packets leave under, with ports nat_first..nat_last where
    their own is taken. `overlay_ifindex`: the VXLAN device; 0: pods are routed natively.
    `tunnel_port`: UDP port of tunnels, closed to endpoints; 0: none."""

    LAYOUT: ClassVar[Struct] = Struct("=3I3H2x")

    flags: ConfigFlags
    node_ipv4: int
    overlay_ifindex: int = 0
    tunnel_port: int = 0
    nat_first: int = 0
    nat_last: int = 0

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.flags,
            htonl(self.node_ipv4),
            self.overlay_ifindex,
            htons(self.tunnel_port),
            self.nat_first,
            self.nat_last,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        flags, node_ipv4, overlay, tunnel_port, first, last = cls.LAYOUT.unpack(data)
        return cls(ConfigFlags(flags), ntohl(node_ipv4), overlay, ntohs(tunnel_port), first, last)


class Event(NamedTuple):
    """One record of the ring, fields as the kernel wrote them; the properties translate.

    A tuple and not a dataclass because hundreds of thousands are made per drain, straight from
    `Struct.iter_unpack`.
    """

    time_ns: int
    endpoint: int
    src_identity: int
    dst_identity: int
    rule_id: int
    staged_rule_id: int
    length: int
    sport_be: int
    dport_be: int
    saddr: bytes
    daddr: bytes
    type: int
    reason: int
    verdict: int
    direction: int
    proto: int
    tcp_flags: int
    family: int
    match: int
    flags: int
    staged: int
    point: int
    pad: int

    @property
    def sport(self) -> int:
        """ICMP: the type."""
        return ntohs(self.sport_be)

    @property
    def dport(self) -> int:
        """ICMP: the code."""
        return ntohs(self.dport_be)

    @property
    def source(self) -> IPv4Address | IPv6Address:
        return IPv4Address(self.saddr[12:]) if self.family == 4 else IPv6Address(self.saddr)

    @property
    def destination(self) -> IPv4Address | IPv6Address:
        return IPv4Address(self.daddr[12:]) if self.family == 4 else IPv6Address(self.daddr)

    @property
    def dropped(self) -> bool:
        return self.type == EventType.DROP


EVENT_LAYOUT: Final = Struct("=Q6I2H16s16s12B")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Codec(Generic[T]):
    """How one key or value type travels through a map."""

    size: int
    pack: Callable[[T], bytes]
    unpack: Callable[[bytes], T]


_U32 = Struct("=I")
_BE32 = Struct("!I")


def _first(layout: Struct) -> Callable[[bytes], int]:
    def unpack(data: bytes) -> int:
        value: int = layout.unpack(data)[0]
        return value

    return unpack


U32: Final[Codec[int]] = Codec(4, _U32.pack, _first(_U32))
ADDRESS4: Final[Codec[int]] = Codec(4, _BE32.pack, _first(_BE32))
ADDRESS6: Final[Codec[int]] = Codec(16, pack6, unpack6)
