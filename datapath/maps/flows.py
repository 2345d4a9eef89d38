"""The records of tracked and of masqueraded flows; as layout.py, whose conventions hold here."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from socket import htonl, htons, ntohl, ntohs
from struct import Struct
from typing import ClassVar, Self

from datapath.maps.layout import Verdict, pack6, unpack6


class CtFlags(IntFlag):
    INITIATOR_1 = 1
    REPLY_SEEN = 2
    FIN_FWD = 4
    FIN_REV = 8
    RST = 16
    SYN_ONLY = 32
    VIA_STACK = 64


class NatDirection(IntEnum):
    OUT = 0
    IN = 1


@dataclass(frozen=True, slots=True, order=True)
class CtKey:
    """The two ends, mapped, in an order of the programs' choice; which of them began the flow is in
    the entry's flags. Of an ICMP echo the asker's port is the id, the other's 8."""

    LAYOUT: ClassVar[Struct] = Struct("=16s16s2HB3x")

    addr: tuple[int, int]
    port: tuple[int, int]
    proto: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            pack6(self.addr[0]),
            pack6(self.addr[1]),
            htons(self.port[0]),
            htons(self.port[1]),
            self.proto,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        a, b, p, q, proto = cls.LAYOUT.unpack(data)
        return cls((unpack6(a), unpack6(b)), (ntohs(p), ntohs(q)), proto)


@dataclass(frozen=True, slots=True)
class CtSide:
    """What one judge said. Only VERDICT_ALLOW is ever cached; NONE: this side was not judged.
    `audited`: it was a denial, and the endpoint audits."""

    LAYOUT: ClassVar[Struct] = Struct("=3IHBB")

    slot: int
    revision: int
    rule_id: int
    proxy_port: int
    verdict: Verdict
    audited: bool = False

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            self.slot,
            self.revision,
            self.rule_id,
            htons(self.proxy_port),
            self.verdict,
            self.audited,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        slot, revision, rule_id, port, verdict, audited = cls.LAYOUT.unpack(data)
        return cls(slot, revision, rule_id, ntohs(port), Verdict(verdict), bool(audited))


@dataclass(frozen=True, slots=True)
class CtEntry:
    """`packets`, `octets`: (forward, reply). `last_seen_ns`: CLOCK_MONOTONIC, tick resolution.
    `tunnel`: IPv4 address of the node the flow came from encapsulated; 0: it did not."""

    LAYOUT: ClassVar[Struct] = Struct("=5Q4I16s16s")

    last_seen_ns: int
    packets: tuple[int, int]
    octets: tuple[int, int]
    flags: CtFlags
    src_identity: int
    dst_identity: int
    tunnel: int
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
            htonl(self.tunnel),
            self.ingress.pack(),
            self.egress.pack(),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        seen, p0, p1, b0, b1, flags, src, dst, tunnel, ingress, egress = cls.LAYOUT.unpack(data)
        return cls(
            seen,
            (p0, p1),
            (b0, b1),
            CtFlags(flags),
            src,
            dst,
            ntohl(tunnel),
            CtSide.unpack(ingress),
            CtSide.unpack(egress),
        )


@dataclass(frozen=True, slots=True, order=True)
class NatKey:
    """`local`: the endpoint's address (OUT) or the node's (IN); ICMP echo: `port` is the id."""

    LAYOUT: ClassVar[Struct] = Struct("=2I2H2B2x")

    local: int
    remote: int
    port: int
    remote_port: int
    proto: int
    direction: NatDirection

    def pack(self) -> bytes:
        return self.LAYOUT.pack(
            htonl(self.local),
            htonl(self.remote),
            htons(self.port),
            htons(self.remote_port),
            self.proto,
            self.direction,
        )

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        local, remote, port, remote_port, proto, direction = cls.LAYOUT.unpack(data)
        return cls(
            ntohl(local),
            ntohl(remote),
            ntohs(port),
            ntohs(remote_port),
            proto,
            NatDirection(direction),
        )


@dataclass(frozen=True, slots=True)
class NatEntry:
    """What stands in for `local` and `port` of the key."""

    LAYOUT: ClassVar[Struct] = Struct("=IH2x")

    addr: int
    port: int

    def pack(self) -> bytes:
        return self.LAYOUT.pack(htonl(self.addr), htons(self.port))

    @classmethod
    def unpack(cls, data: bytes) -> Self:
        addr, port = cls.LAYOUT.unpack(data)
        return cls(ntohl(addr), ntohs(port))
