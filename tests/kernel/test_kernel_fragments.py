"""Datagrams in pieces, sent by real stacks and made up."""

from __future__ import annotations

import socket

import pytest

from datapath.maps.layout import EventType, PeerFlags, PolicyPortKey, Verdict
from tests.fakes.kernel_node import KernelNode, Workload, answer, peer
from tests.fakes.netns import checksum
from tests.fakes.packets import (
    FRAGMENT6,
    TCP,
    UDP,
    extension,
    fragment6,
    ipv4_packet,
    ipv6_packet,
    tcp_segment,
    udp_datagram,
)
from tests.kernel.conftest import dropped_with

pytestmark = pytest.mark.kernel

ALLOW, NONE = Verdict.ALLOW, Verdict.NONE
INGRESS = 1
OPEN, CLOSED = 5000, 5001
MORE = 0x2000


@pytest.fixture
def one_port(node: KernelNode, bob: Workload) -> KernelNode:
    """bob takes datagrams at one port."""
    rows = {0: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, OPEN, UDP): answer(ALLOW, 61)})
    node.place(bob, slot_in=7)
    return node


@pytest.mark.parametrize("family", [4, 6])
def test_a_large_datagram_is_judged_by_the_ports_of_its_first_fragment(
    one_port: KernelNode, alice: Workload, bob: Workload, family: int
) -> None:
    address = bob.ip if family == 4 else bob.ip6
    anywhere = "0.0.0.0" if family == 4 else "::"
    with (
        bob.ns.udp(OPEN, anywhere) as receiver,
        bob.ns.udp(CLOSED, anywhere) as closed,
        alice.ns.udp(0, anywhere) as sender,
    ):
        sender.sendto(b"x" * 5000, (address, OPEN))
        assert len(receiver.recv(8192)) == 5000
        assert one_port.drops() == []
        sender.sendto(b"x" * 5000, (address, CLOSED))
        with pytest.raises(TimeoutError):
            closed.recv(8192)
        assert {drop[0] for drop in one_port.drops()} == {133}


@pytest.mark.parametrize("family", [4, 6])
def test_a_large_datagram_from_the_network_is_judged_likewise(
    one_port: KernelNode, bob: Workload, family: int
) -> None:
    address = bob.ip if family == 4 else bob.ip6
    anywhere = "0.0.0.0" if family == 4 else "::"
    with bob.ns.udp(OPEN, anywhere) as receiver, one_port.remote.udp(0, anywhere) as sender:
        sender.sendto(b"x" * 5000, (address, OPEN))
        assert len(receiver.recv(8192)) == 5000
        sender.sendto(b"x" * 5000, (address, CLOSED))
    drops = one_port.drops()
    assert {drop[:2] for drop in drops} == {(133, INGRESS)}


def pieces(
    alice: Workload, bob: Workload, family: int, ident: int, *parts: tuple[int, bool, bytes]
) -> list[bytes]:
    """Packets of (offset, more, bytes)."""
    if family == 4:
        return [
            ipv4_packet(alice, bob, UDP, data, id=ident, fragment=offset // 8 | MORE * more)
            for offset, more, data in parts
        ]
    return [
        ipv6_packet(alice, bob.address6, FRAGMENT6, fragment6(UDP, ident, offset, more=more) + data)
        for offset, more, data in parts
    ]


DATAGRAM = udp_datagram(4000, OPEN, bytes(56))


@pytest.mark.parametrize("family", [4, 6])
def test_later_pieces_carry_the_firsts_ports_in_events_and_flows(
    one_port: KernelNode, alice: Workload, bob: Workload, family: int
) -> None:
    first, later = pieces(
        alice, bob, family, 9, (0, True, DATAGRAM[:32]), (32, False, DATAGRAM[32:])
    )
    assert dropped_with(one_port, alice, first) == 0
    assert dropped_with(one_port, alice, later) == 0
    ((_, entry),) = one_port.tables.ct.items()
    assert entry.packets == (2, 0)
    one_port.policy(7, {})
    one_port.inject(alice, later)
    (drop,) = one_port.events(EventType.DROP)
    assert (drop.reason, drop.sport, drop.dport) == (133, 4000, OPEN)


@pytest.mark.parametrize("family", [4, 6])
def test_a_piece_before_the_first_or_over_it_is_dropped(
    one_port: KernelNode, alice: Workload, bob: Workload, family: int
) -> None:
    first, over, behind, other = pieces(
        alice,
        bob,
        family,
        10,
        (0, True, DATAGRAM[:32]),
        (8, True, bytes(24)),
        (32, False, bytes(8)),
        (24, False, bytes(16)),
    )
    assert dropped_with(one_port, alice, behind) == 175
    assert dropped_with(one_port, alice, first) == 0
    assert dropped_with(one_port, alice, over) == 157
    assert dropped_with(one_port, alice, other) == 157
    assert dropped_with(one_port, alice, behind) == 0
    (stranger,) = pieces(alice, bob, family, 11, (32, False, bytes(8)))
    assert dropped_with(one_port, alice, stranger) == 175


@pytest.mark.parametrize("family", [4, 6])
def test_pieces_no_sender_makes_are_dropped(
    node: KernelNode, alice: Workload, bob: Workload, family: int
) -> None:
    for odd in (
        (0, True, DATAGRAM[:33]),  # not whole eight bytes
        (65528, False, bytes(16)),  # ends beyond the largest datagram
        (32, False, b""),
    ):
        (packet,) = pieces(alice, bob, family, 12, odd)
        assert dropped_with(node, alice, packet) == 134
    (tiny,) = pieces(alice, bob, family, 13, (0, True, DATAGRAM[:0] + bytes(8)))
    assert dropped_with(node, alice, tiny) == 135  # a UDP length of zero


def test_a_transport_header_cut_by_fragmenting_is_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    segment = tcp_segment(4000, 80)
    tiny = ipv4_packet(alice, bob, TCP, segment[:16], id=14, fragment=MORE)
    assert dropped_with(node, alice, tiny) == 135
    rest = ipv4_packet(alice, bob, TCP, segment[16:], id=14, fragment=2)
    assert dropped_with(node, alice, rest) == 175
    tiny6 = fragment6(TCP, 14, 0, more=True) + segment[:16]
    assert dropped_with(node, alice, ipv6_packet(alice, bob.address6, FRAGMENT6, tiny6)) == 135


def test_a_forged_first_piece_does_not_speak_for_anybodys_later_ones(
    one_port: KernelNode, alice: Workload, bob: Workload
) -> None:
    first, later = pieces(alice, bob, 4, 15, (0, True, DATAGRAM[:32]), (32, False, DATAGRAM[32:]))
    stolen = first[:6] + b"\x02\0\0\0\0\1" + first[12:]
    assert dropped_with(one_port, alice, stolen) == 130
    assert dropped_with(one_port, alice, later) == 175


def test_an_ipv6_packet_that_is_its_only_piece_is_whole(
    one_port: KernelNode, alice: Workload, bob: Workload
) -> None:
    atomic = fragment6(UDP, 16, 0, more=False) + DATAGRAM
    assert dropped_with(one_port, alice, ipv6_packet(alice, bob.address6, FRAGMENT6, atomic)) == 0
    twice = fragment6(FRAGMENT6, 16, 0, more=False) + atomic
    assert dropped_with(one_port, alice, ipv6_packet(alice, bob.address6, FRAGMENT6, twice)) == 156


def test_headers_between_fragment_and_transport_are_walked_in_the_first_piece_only(
    one_port: KernelNode, alice: Workload, bob: Workload
) -> None:
    chain = extension(UDP) + DATAGRAM
    first = fragment6(60, 17, 0, more=True) + chain[:40]
    later = fragment6(60, 17, 40, more=False) + chain[40:]
    for piece in (first, later):
        packet = ipv6_packet(alice, bob.address6, FRAGMENT6, piece)
        assert dropped_with(one_port, alice, packet) == 0


def test_a_large_echo_and_its_reply_pass(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.policy(8, {})
    node.place(bob, slot_out=8)
    with alice.ns.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP) as sock:
        sock.settimeout(0.5)
        body = bytes(3000)
        head = b"\x08\0\0\0\x12\x67\0\1"
        sum_ = checksum(head + body)
        sock.sendto(head[:2] + sum_.to_bytes(2, "big") + head[4:] + body, (bob.ip, 0))
        assert len(sock.recv(4096)) == 20 + 8 + 3000
    assert node.drops() == []
