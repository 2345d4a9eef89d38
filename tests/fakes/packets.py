"""Packets by hand, for BPF_PROG_TEST_RUN."""

from __future__ import annotations

import struct
from ipaddress import IPv6Address
from typing import Final

from tests.fakes.kernel_node import Workload
from tests.fakes.netns import checksum

PASSED: Final = 0  # TC_ACT_OK
DROPPED: Final = 2  # TC_ACT_SHOT
REDIRECTED: Final = 7  # TC_ACT_REDIRECT

ICMP: Final = 1
TCP: Final = 6
UDP: Final = 17
FRAGMENT6: Final = 44
ICMP6: Final = 58
SCTP: Final = 132


def ipv4_packet(
    source: Workload, destination: Workload, proto: int, payload: bytes, **head: int
) -> bytes:
    total = head.get("total", 20 + len(payload))
    return (
        source.link.host_mac
        + source.link.mac
        + b"\x08\x00"
        + bytes([head.get("version_ihl", 0x45), 0])
        + total.to_bytes(2, "big")
        + head.get("id", 0).to_bytes(2, "big")
        + head.get("fragment", 0).to_bytes(2, "big")
        + bytes([head.get("ttl", 64), proto, 0, 0])
        + source.address.packed
        + destination.address.packed
        + payload
    )


def tcp_packet(
    source: Workload, destination: Workload, sport: int, dport: int, *, flags: int = 0x02
) -> bytes:
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    segment = ports + bytes(8) + bytes([0x50, flags]) + bytes(6)
    return ipv4_packet(source, destination, TCP, segment)


def udp_packet(source: Workload, destination: Workload, sport: int, dport: int) -> bytes:
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    return ipv4_packet(source, destination, UDP, ports + b"\x00\x08\x00\x00")


def ipv6_packet(
    source: Workload,
    destination: IPv6Address,
    proto: int,
    payload: bytes,
    *,
    hops: int = 64,
    sender: IPv6Address | None = None,
) -> bytes:
    """`proto`: of the first header after the fixed one. `sender`: not the workload's address."""
    return (
        source.link.host_mac
        + source.link.mac
        + b"\x86\xdd\x60\0\0\0"
        + len(payload).to_bytes(2, "big")
        + bytes([proto, hops])
        + (sender or source.address6).packed
        + destination.packed
        + payload
    )


def udp_datagram(sport: int, dport: int, payload: bytes = b"") -> bytes:
    """Without a checksum, which the programs do not look at."""
    length = 8 + len(payload)
    return struct.pack("!4H", sport, dport, length, 0) + payload


def tcp_segment(sport: int, dport: int, *, flags: int = 0x02) -> bytes:
    return struct.pack("!2H2I2B3H", sport, dport, 0, 0, 0x50, flags, 0, 0, 0)


def extension(following: int, body: bytes = bytes(6)) -> bytes:
    """A hop-by-hop, routing or destination header; `body` fills it up to whole eight bytes."""
    return bytes([following, (len(body) + 2) // 8 - 1]) + body


def fragment6(following: int, ident: int, offset: int, *, more: bool) -> bytes:
    return struct.pack("!2BHI", following, 0, offset | more, ident)


def sums_up(packet: bytes) -> bool:
    """Whether the checksums of an Ethernet frame with plain headers are right (RFC 1071)."""
    ip = packet[14:]
    if ip[0] >> 4 == 4:
        proto, ends, body = ip[9], ip[12:20], ip[20 : int.from_bytes(ip[2:4], "big")]
        if checksum(ip[:20]):
            return False
    else:
        proto, ends = ip[6], ip[8:40]
        body = ip[40 : 40 + int.from_bytes(ip[4:6], "big")]
    if proto == ICMP:
        return not checksum(body)
    return not checksum(ends + struct.pack("!2I", len(body), proto) + body)


def with_sums(packet: bytes) -> bytes:
    """A frame with plain headers around TCP, UDP or an echo, its checksums put right."""
    four = packet[14] >> 4 == 4
    start = 34 if four else 54
    proto = packet[23] if four else packet[20]
    at = start + {TCP: 16, UDP: 6, ICMP: 2, ICMP6: 2}[proto]
    blank = packet[:at] + b"\0\0" + packet[at + 2 :]
    ends = b"" if proto == ICMP else blank[26:34] if four else blank[22:54]
    tail = b"" if proto == ICMP else struct.pack("!2I", len(blank) - start, proto)
    found = checksum(ends + tail + blank[start:]) or 0xFFFF
    whole = blank[:at] + found.to_bytes(2, "big") + blank[at + 2 :]
    if not four:
        return whole
    head = whole[14:24] + b"\0\0" + whole[26:34]
    return whole[:24] + checksum(head).to_bytes(2, "big") + whole[26:]
