"""Packets no sane stack sends, run through the programs one by one."""

from __future__ import annotations

import random
import socket
import struct

import pytest

from datapath.maps.layout import EventType, PeerFlags, PolicyPortKey, Verdict
from tests.fakes.kernel_node import NODE, KernelNode, Workload, answer, peer
from tests.fakes.netns import checksum
from tests.fakes.packets import (
    DROPPED,
    ICMP6,
    PASSED,
    REDIRECTED,
    SCTP,
    TCP,
    UDP,
    ipv4_packet,
    ipv6_packet,
    tcp_packet,
    udp_datagram,
    udp_packet,
)
from tests.kernel.conftest import dropped_with

pytestmark = pytest.mark.kernel

EGRESS = 2


def test_malformed_ip_headers_are_dropped(node: KernelNode, alice: Workload, bob: Workload) -> None:
    segment = tcp_packet(alice, bob, 1, 2)[34:]

    def packet(**head: int) -> bytes:
        return ipv4_packet(alice, bob, TCP, segment, **head)

    assert dropped_with(node, alice, packet()) == 0
    assert dropped_with(node, alice, packet(version_ihl=0x65)) == 134
    assert dropped_with(node, alice, packet(version_ihl=0x44)) == 134
    assert dropped_with(node, alice, packet(total=41)) == 134
    assert dropped_with(node, alice, packet(total=19)) == 134
    assert dropped_with(node, alice, packet(total=0)) == 134
    assert dropped_with(node, alice, packet(version_ihl=0x4F)) == 134
    assert dropped_with(node, alice, packet()[:50]) == 134


def test_a_frame_that_ends_inside_the_ip_header_is_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    frame = tcp_packet(alice, bob, 1, 2)[:30]
    with alice.ns.socket(socket.SOCK_RAW, family=socket.AF_PACKET) as sock:
        alice.ns.call(lambda: sock.bind(("eth0", 0x0800)))
        sock.send(frame)
    assert [drop[0] for drop in node.drops()] == [134]


def test_truncated_transport_headers_are_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    tcp, udp = tcp_packet(alice, bob, 1, 2)[34:], udp_packet(alice, bob, 1, 2)[34:]
    for payload in (tcp[:19], tcp[:12] + b"\x40" + tcp[13:], tcp[:12] + b"\x60" + tcp[13:]):
        assert dropped_with(node, alice, ipv4_packet(alice, bob, TCP, payload)) == 135
    for payload in (udp[:7], udp[:4] + b"\0\7" + udp[6:], udp[:4] + b"\0\x09" + udp[6:]):
        assert dropped_with(node, alice, ipv4_packet(alice, bob, UDP, payload)) == 135
    assert dropped_with(node, alice, ipv4_packet(alice, bob, 1, b"\x08\0\0\0\0\0\0")) == 135


def test_bytes_beyond_the_total_length_are_no_header(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    packet = ipv4_packet(alice, bob, TCP, tcp_packet(alice, bob, 1, 2)[34:], total=30)
    assert dropped_with(node, alice, packet) == 135


def test_ip_options_are_stepped_over(node: KernelNode, alice: Workload, bob: Workload) -> None:
    segment = b"\1\1\1\1" + tcp_packet(alice, bob, 1, 2222)[34:]
    node.inject(alice, ipv4_packet(alice, bob, TCP, segment, version_ihl=0x46))
    verdict = node.events(EventType.VERDICT)[0]
    assert (verdict.sport, verdict.dport) == (1, 2222)


def test_a_forged_source_is_dropped(node: KernelNode, alice: Workload, bob: Workload) -> None:
    packet = tcp_packet(alice, bob, 1, 2)
    foreign_mac = packet[:6] + b"\x02\0\0\0\0\1" + packet[12:]
    assert dropped_with(node, alice, foreign_mac) == 130
    foreign_ip = packet[:26] + bob.address.packed + packet[30:]
    assert dropped_with(node, alice, foreign_ip) == 132


def test_other_ethernet_protocols_are_dropped_and_arp_passes(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    packet = tcp_packet(alice, bob, 1, 2)
    assert dropped_with(node, alice, packet[:12] + b"\x88\x47" + packet[14:]) == 166
    assert dropped_with(node, alice, packet[:12] + b"\x81\x00\0\5" + packet[12:]) == 166
    assert node.inject(alice, packet[:12] + b"\x08\x06" + packet[14:]) == PASSED


def test_traffic_to_oneself_passes(node: KernelNode, alice: Workload) -> None:
    node.policy(7, {})
    node.place(alice, slot_in=7, slot_out=7)
    assert node.inject(alice, tcp_packet(alice, alice, 1, 2)) == REDIRECTED
    assert node.events() == []


def test_an_interface_without_a_row_drops(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.tables.endpoints.delete_many([alice.link.ifindex])
    assert dropped_with(node, alice, tcp_packet(alice, bob, 1, 2)) == 203


def test_a_slot_without_rows_denies(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.place(alice, slot_out=200)
    assert dropped_with(node, alice, tcp_packet(alice, bob, 1, 2)) == 133


def test_a_slot_beyond_the_table_is_a_missing_configuration(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.place(alice, slot_out=99999)
    assert dropped_with(node, alice, tcp_packet(alice, bob, 1, 2)) == 165


def icmp_error(source: Workload, destination: Workload, quoted: bytes) -> bytes:
    body = b"\3\3\0\0\0\0\0\0" + quoted
    body = body[:2] + checksum(body).to_bytes(2, "big") + body[4:]
    return ipv4_packet(source, destination, 1, body)


def test_an_icmp_error_passes_only_for_the_senders_own_tracked_flow(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    sent = udp_packet(alice, bob, 5000, 53)
    assert node.inject(alice, sent) == REDIRECTED
    node.policy(8, {})
    node.place(bob, slot_out=8)
    quoted = sent[14:]
    assert dropped_with(node, bob, icmp_error(bob, alice, quoted)) == 0
    another_port = udp_packet(alice, bob, 5001, 53)[14:]
    assert dropped_with(node, bob, icmp_error(bob, alice, another_port)) == 133
    not_to_bob = quoted[:16] + NODE.packed + quoted[20:]
    assert dropped_with(node, bob, icmp_error(bob, alice, not_to_bob)) == 133
    assert dropped_with(node, bob, icmp_error(bob, alice, quoted[:20])) == 133


def test_an_unasked_echo_reply_is_judged_each_time(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    reply = ipv4_packet(bob, alice, 1, b"\0\0\0\0\0\5\0\1")
    assert node.inject(bob, reply) == REDIRECTED
    assert node.tables.ct.count() == 0
    node.policy(8, {1002: peer(Verdict.DENY, 40)})
    node.place(alice, slot_in=8)
    assert dropped_with(node, bob, reply) == 181


def test_when_the_ring_is_full_events_are_lost_and_counted(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    lost = node.tables.metrics.get(510)
    assert lost is not None
    room = 262144 // 88
    packet = tcp_packet(alice, bob, 1, 2)
    node.tables.endpoints.delete_many([alice.link.ifindex])
    for _ in range(room + 5):
        node.inject(alice, packet)
    assert len(node.events()) == room
    now = node.tables.metrics.get(510)
    assert now is not None
    assert now.packets == lost.packets + 5


def options_packet(alice: Workload, bob: Workload, options: bytes, port: int) -> bytes:
    """A datagram behind IP options, filled up to whole words."""
    padded = options + bytes(-len(options) % 4)
    words = 5 + len(padded) // 4
    datagram = udp_datagram(4000, port)
    return ipv4_packet(alice, bob, UDP, padded + datagram, version_ihl=0x40 | words)


ROUTE = b"\x07\x04" + NODE.packed  # length and pointer, and the next stop


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (b"\x01\x01\x01\x00", 0),
        (b"\x94\x04\x00\x00", 0),  # router alert
        (b"\x44\x0c\x05\x00" + bytes(8), 0),  # timestamps
        (b"\x83" + ROUTE, 134),
        (b"\x89" + ROUTE, 134),
        (b"\x01\x01\x83" + ROUTE, 134),
        (b"\x94\x04\x00\x00\x83" + ROUTE, 134),
        (b"\x94\x00\x00\x00", 134),
        (b"\x94\x01\x00\x00", 134),
        (b"\x94\x28\x00\x00", 134),
        (b"\x01\x01\x01\x94", 134),
        (b"\x00\x83" + ROUTE, 0),  # nothing counts behind the end
    ],
    ids=lambda value: value.hex() if isinstance(value, bytes) else str(value),
)
def test_ip_options_are_passed_over_and_source_routes_refused(
    node: KernelNode, alice: Workload, bob: Workload, options: bytes, reason: int
) -> None:
    """Passed over: the port behind them is judged."""
    rows = {0: peer(Verdict.NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 5000, UDP): answer(Verdict.ALLOW, 61)})
    node.place(bob, slot_in=7)
    assert dropped_with(node, alice, options_packet(alice, bob, options, 5000)) == reason
    closed = options_packet(alice, bob, options, 5001)
    assert dropped_with(node, alice, closed) == (reason or 133)


def test_a_packet_to_its_own_source_stays_with_its_endpoint(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    """The land attack: from bob's address to bob, sent by anybody else."""
    land = udp_packet(bob, bob, 80, 80)
    forged = land[:6] + alice.link.mac + land[12:]
    assert dropped_with(node, alice, forged) == 132
    assert node.run(bob, land, program="to_endpoint").result == DROPPED
    assert [drop[0] for drop in node.drops()] == [132]


def test_a_protocol_of_the_other_family_is_unknown(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    assert dropped_with(node, alice, ipv4_packet(alice, bob, ICMP6, bytes(16))) == 137


def test_truncated_sctp_is_dropped_and_its_port_is_judged(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {0: peer(Verdict.NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 3868, SCTP): answer(Verdict.ALLOW, 61)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)

    def chunk(sport: int, dport: int) -> bytes:
        return struct.pack("!2H2I", sport, dport, 1, 0) + b"\x01\0\0\x14" + bytes(16)

    assert dropped_with(node, alice, ipv4_packet(alice, bob, SCTP, chunk(4000, 3868)[:11])) == 135
    assert dropped_with(node, alice, ipv4_packet(alice, bob, SCTP, chunk(4000, 3869))) == 133
    assert dropped_with(node, alice, ipv4_packet(alice, bob, SCTP, chunk(4000, 3868))) == 0
    assert dropped_with(node, bob, ipv4_packet(bob, alice, SCTP, chunk(3868, 4000))) == 0
    assert dropped_with(node, bob, ipv4_packet(bob, alice, SCTP, chunk(3868, 4001))) == 133
    over_ipv6 = ipv6_packet(alice, bob.address6, SCTP, chunk(4000, 3868))
    assert dropped_with(node, alice, over_ipv6) == 0


@pytest.mark.parametrize("family", [4, 6])
def test_no_random_packet_passes_a_judge_that_allows_nothing(
    node: KernelNode, alice: Workload, bob: Workload, family: int
) -> None:
    """Headers of chance behind a right source: dropped, and nothing is remembered but fragments."""
    node.policy(8, {})
    node.place(alice, slot_out=8)
    rng = random.Random(family)
    base = (
        udp_packet(alice, bob, 1, 2)
        if family == 4
        else ipv6_packet(alice, bob.address6, UDP, udp_datagram(1, 2))
    )
    own = slice(26, 30) if family == 4 else slice(22, 38)
    for _ in range(3000):
        packet = bytearray(base[:14] + rng.randbytes(rng.randrange(40, 120)))
        packet[14] = 0x60 if family == 6 else 0x40 | rng.choice((5, 5, 6, 9, 15, 4))
        packet[own] = base[own]
        length = len(packet) - 14
        if rng.random() < 0.9:
            place = slice(16, 18) if family == 4 else slice(18, 20)
            packet[place] = (length if family == 4 else length - 40).to_bytes(2, "big")
        next_header = 23 if family == 4 else 20
        packet[next_header] = rng.choice((0, 1, 6, 17, 43, 44, 51, 58, 60, 132, 255))
        if bytes(packet[30:34] if family == 4 else packet[38:54]) == bytes(base[own]):
            continue
        assert node.inject(alice, bytes(packet)) == DROPPED
    assert node.tables.ct.count() == 0
