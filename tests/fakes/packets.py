"""Packets by hand, for BPF_PROG_TEST_RUN."""

from __future__ import annotations

from typing import Final

from tests.fakes.kernel_node import Workload

PASSED: Final = 0  # TC_ACT_OK
DROPPED: Final = 2  # TC_ACT_SHOT
REDIRECTED: Final = 7  # TC_ACT_REDIRECT

TCP: Final = 6
UDP: Final = 17


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
        + b"\0\0"
        + head.get("fragment", 0).to_bytes(2, "big")
        + bytes([64, proto, 0, 0])
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
