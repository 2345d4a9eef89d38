"""The records user space and the programs share, twin of datapath/bpf/abi.h.

Every struct of abi.h is one frozen dataclass with `pack` and `unpack`; sizes, offsets and
enumerators are compared with the built object's BTF in tests/kernel. In Python an IPv4 address is
`int(IPv4Address(...))`, a port is its number, a MAC six bytes; the byte order of the kernel side
is dealt with here and nowhere else.
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
    READY = 1


class PeerFlags(IntFlag):
    HAS_PORTS = 1
    HAS_RANGES = 2


class CtFlags(IntFlag):
    INITIATOR_1 = 1
    REPLY_SEEN = 2
    FIN_FWD = 4
    FIN_REV = 8
    RST = 16
    SYN_ONLY = 32
    VIA_STACK = 64


class EventType(IntEnum):
    DROP = 1
    TRACE = 4
    VERDICT = 5


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
    UNSUPPORTED_L3 = 139
    CT_INSERT_FAILED = 155
    FRAGMENT = 157
    NO_CONFIG = 165
    UNSUPPORTED_L2 = 166
    POLICY_DENY = 181
    EP_NOT_READY = 203
    PROXY_PUNT = 205


@dataclass(frozen=True, slots=True)
class Endpoint:
    """`mac`: of the interface inside the namespace. `host_mac`: of the host side."""

    LAYOUT: ClassVar[Struct] = Struct("=6I6s6s")

    id: int
    identity: int
    slot_in: int
    slot_out: int
    flags: EndpointFlags
    ipv4: int
    mac: bytes
    host_mac: bytes

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
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        ident, identity, slot_in, slot_out, flags, ipv4, mac, host_mac = cls.LAYOUT.unpack(data)
        return cls(
            ident, identity, slot_in, slot_out, EndpointFlags(flags), ntohl(ipv4), mac, host_mac
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
    """`verdict`, `rule_id`: the answer when no port row matches."""

    LAYOUT: ClassVar[Struct] = Struct("=2IH2B")

    class_id: int
    rule_id: int
    proxy_port: int
    verdict: Verdict
    flags: PeerFlags

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.class_id, self.rule_id, htons(self.proxy_port), self.verdict, self.flags
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        class_id, rule_id, proxy_port, verdict, flags = cls.LAYOUT.unpack(data)
        return cls(class_id, rule_id, ntohs(proxy_port), Verdict(verdict), PeerFlags(flags))


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
    LAYOUT: ClassVar[Struct] = Struct("=IHBx")

    rule_id: int
    proxy_port: int
    verdict: Verdict

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.rule_id, htons(self.proxy_port), self.verdict)

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        rule_id, proxy_port, verdict = cls.LAYOUT.unpack(data)
        return cls(rule_id, ntohs(proxy_port), Verdict(verdict))


@dataclass(frozen=True, slots=True, order=True)
class CtKey:
    """(addr, port) pairs ascending; of an ICMP echo the asker's port is the id, the other's 8."""

    LAYOUT: ClassVar[Struct] = Struct("=2I2HB3x")

    addr: tuple[int, int]
    port: tuple[int, int]
    proto: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            htonl(self.addr[0]),
            htonl(self.addr[1]),
            htons(self.port[0]),
            htons(self.port[1]),
            self.proto,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        a, b, p, q, proto = cls.LAYOUT.unpack(data)
        return cls((ntohl(a), ntohl(b)), (ntohs(p), ntohs(q)), proto)


@dataclass(frozen=True, slots=True)
class CtSide:
    """What one judge said. Only VERDICT_ALLOW is ever cached; NONE: this side was not judged."""

    LAYOUT: ClassVar[Struct] = Struct("=3IHBx")

    slot: int
    revision: int
    rule_id: int
    proxy_port: int
    verdict: Verdict

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.slot, self.revision, self.rule_id, htons(self.proxy_port), self.verdict
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        slot, revision, rule_id, proxy_port, verdict = cls.LAYOUT.unpack(data)
        return cls(slot, revision, rule_id, ntohs(proxy_port), Verdict(verdict))


@dataclass(frozen=True, slots=True)
class CtEntry:
    """`packets`, `octets`: (forward, reply). `last_seen_ns`: CLOCK_MONOTONIC, tick resolution."""

    LAYOUT: ClassVar[Struct] = Struct("=5Q3I4x16s16s")

    last_seen_ns: int
    packets: tuple[int, int]
    octets: tuple[int, int]
    flags: CtFlags
    src_identity: int
    dst_identity: int
    ingress: CtSide
    egress: CtSide

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.last_seen_ns,
            *self.packets,
            *self.octets,
            self.flags,
            self.src_identity,
            self.dst_identity,
            self.ingress.pack(),
            self.egress.pack(),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        seen, p0, p1, b0, b1, flags, src, dst, ingress, egress = cls.LAYOUT.unpack(data)
        return cls(
            seen,
            (p0, p1),
            (b0, b1),
            CtFlags(flags),
            src,
            dst,
            CtSide.unpack(ingress),
            CtSide.unpack(egress),
        )


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
    """`host_ifindex`: device that leads to the host; 0 = none."""

    LAYOUT: ClassVar[Struct] = Struct("=3I4x")

    host_ifindex: int
    flags: int
    node_ipv4: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(self.host_ifindex, self.flags, htonl(self.node_ipv4))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        host_ifindex, flags, node_ipv4 = cls.LAYOUT.unpack(data)
        return cls(host_ifindex, flags, ntohl(node_ipv4))


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
        return IPv4Address(self.saddr[:4]) if self.family == 4 else IPv6Address(self.saddr)

    @property
    def destination(self) -> IPv4Address | IPv6Address:
        return IPv4Address(self.daddr[:4]) if self.family == 4 else IPv6Address(self.daddr)

    @property
    def dropped(self) -> bool:
        return self.type == EventType.DROP


EVENT_LAYOUT: Final = Struct("=Q5I2H16s16s8B")

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
