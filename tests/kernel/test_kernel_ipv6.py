"""IPv6: sockets of real namespaces, and packets no sane stack sends."""

from __future__ import annotations

import dataclasses
import socket
import struct
from ipaddress import IPv6Address

import pytest

from datapath.maps.layout import (
    EventType,
    IpcacheEntry,
    PeerFlags,
    PolicyPortKey,
    Prefix6,
    Verdict,
    plain,
)
from tests.fakes.kernel_node import (
    GATEWAY6,
    REMOTE6,
    REMOTE_IDENTITY,
    KernelNode,
    Workload,
    answer,
    peer,
)
from tests.fakes.packets import (
    DROPPED,
    ICMP6,
    PASSED,
    REDIRECTED,
    TCP,
    UDP,
    extension,
    ipv6_packet,
    tcp_segment,
    udp_datagram,
)
from tests.kernel.conftest import dropped_with

pytestmark = pytest.mark.kernel

ALLOW, DENY, NONE = Verdict.ALLOW, Verdict.DENY, Verdict.NONE
INGRESS, EGRESS = 1, 2
HOP, ROUTING, AH, ESP, NOTHING, OPTIONS = 0, 43, 51, 50, 59, 60
ALL_NODES = IPv6Address("ff02::1")
LINK_LOCAL = IPv6Address("fe80::aa")


def test_a_port_is_open_to_who_may_and_closed_to_others(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 80, TCP): answer(ALLOW, 61)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    with bob.ns.listen(80, "::") as listener, bob.ns.listen(81, "::"):
        with alice.ns.connect(bob.ip6, 80) as near:
            far, _ = listener.accept()
            with far:
                near.sendall(b"ask")
                assert far.recv(8) == b"ask"
                far.sendall(b"answer")
                assert near.recv(8) == b"answer"
        ((key, entry),) = node.tables.ct.items()
        assert {plain(address) for address in key.addr} == {alice.address6, bob.address6}
        assert (entry.ingress.rule_id, entry.src_identity) == (61, 1001)
        assert not alice.ns.can_connect(bob.ip6, 81, timeout_s=0.2)
        assert not node.remote.can_connect(bob.ip6, 80, timeout_s=0.2)
    drops = node.events(EventType.DROP)
    assert {(d.reason, str(d.source), d.dport) for d in drops} == {
        (133, alice.ip6, 81),
        (133, str(REMOTE6), 80),
    }


def test_the_network_is_known_by_exact_address_and_by_prefix(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {REMOTE_IDENTITY: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80, "::"):
        assert node.remote.can_connect(bob.ip6, 80)
        node.tables.ipcache6_prefix.delete_many([Prefix6(128, int(REMOTE6))])
        assert not node.remote.can_connect(bob.ip6, 80, timeout_s=0.2)
        wide = Prefix6(32, 0xFD000077 << 96)
        node.tables.ipcache6_prefix.put_many({wide: IpcacheEntry(REMOTE_IDENTITY)})
        assert node.remote.can_connect(bob.ip6, 80)
        node.tables.ipcache6.put_many({int(REMOTE6): IpcacheEntry(1009)})
        assert not node.remote.can_connect(bob.ip6, 80, timeout_s=0.2)


def test_an_endpoint_reaches_network_and_host(node: KernelNode, alice: Workload) -> None:
    with node.remote.listen(80, "::"), node.ns.listen(80, "::"):
        assert alice.ns.can_connect(str(REMOTE6), 80)
        assert alice.ns.can_connect("fd00:77::1", 80)
        node.policy(8, {REMOTE_IDENTITY: peer(DENY, 41)})
        node.place(alice, slot_out=8)
        assert not alice.ns.can_connect(str(REMOTE6), 80, timeout_s=0.2)
    assert set(node.drops()) == {(181, EGRESS, 41)}


def test_echo_is_judged_by_type_and_only_asked_for_replies_pass(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 128, ICMP6): answer(ALLOW, 61)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    assert alice.ns.ping(bob.ip6)
    assert not bob.ns.ping(alice.ip6, timeout_s=0.2)
    assert {drop[:2] for drop in node.drops()} == {(133, EGRESS)}
    other = ipv6_packet(alice, bob.address6, ICMP6, b"\x8b\0\0\0" + bytes(12))
    assert dropped_with(node, alice, other) == 133


def test_a_closed_port_is_told_by_an_error_of_the_tracked_flow(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(8, {})
    node.place(bob, slot_out=8)
    with alice.ns.udp(0, "::") as client:
        client.connect((bob.ip6, 5353))
        client.send(b"nobody listens")
        with pytest.raises(ConnectionRefusedError):
            client.recv(8)
    assert node.drops() == []


def icmp6_error(source: Workload, destination: Workload, quoted: bytes) -> bytes:
    return ipv6_packet(source, destination.address6, ICMP6, b"\1\4\0\0\0\0\0\0" + quoted)


def test_an_error_passes_only_for_the_senders_own_flow(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    sent = ipv6_packet(alice, bob.address6, UDP, udp_datagram(5000, 53))
    assert node.inject(alice, sent) == REDIRECTED
    node.policy(8, {})
    node.place(bob, slot_out=8)
    quoted = sent[14:]
    assert dropped_with(node, bob, icmp6_error(bob, alice, quoted)) == 0
    behind_options = quoted[:6] + bytes([OPTIONS]) + quoted[7:40] + extension(UDP) + quoted[40:]
    assert dropped_with(node, bob, icmp6_error(bob, alice, behind_options)) == 0
    other_port = ipv6_packet(alice, bob.address6, UDP, udp_datagram(5001, 53))[14:]
    assert dropped_with(node, bob, icmp6_error(bob, alice, other_port)) == 133
    not_to_bob = quoted[:24] + REMOTE6.packed + quoted[40:]
    assert dropped_with(node, bob, icmp6_error(bob, alice, not_to_bob)) == 133
    assert dropped_with(node, bob, icmp6_error(bob, alice, quoted[:40])) == 133


def test_a_source_that_is_not_the_endpoints_own_is_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    datagram = udp_datagram(1, 2)
    for sender in (bob.address6, REMOTE6, GATEWAY6, IPv6Address("::")):
        forged = ipv6_packet(alice, bob.address6, UDP, datagram, sender=sender)
        assert dropped_with(node, alice, forged) == 132
    for odd in ("::ffff:10.78.0.11", "ff02::5"):
        forged = ipv6_packet(alice, bob.address6, UDP, datagram, sender=IPv6Address(odd))
        assert dropped_with(node, alice, forged) == 134
    disguised = ipv6_packet(alice, IPv6Address("::ffff:10.78.0.12"), UDP, datagram)
    assert dropped_with(node, alice, disguised) == 134


def test_a_local_endpoints_address_from_elsewhere_is_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    packet = ipv6_packet(alice, bob.address6, UDP, udp_datagram(1, 2))
    assert node.run(bob, packet, program="to_endpoint").result == DROPPED
    assert [drop[0] for drop in node.drops()] == [132]
    assert node.run(bob, packet, program="to_endpoint", mark=0x100).result == PASSED


def test_an_endpoint_without_an_ipv6_address_has_none(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    row = node.tables.endpoints.get(alice.link.ifindex)
    assert row is not None
    node.place(alice)
    node.tables.endpoints.put_many({alice.link.ifindex: dataclasses.replace(row, ipv6=0)})
    zero = ipv6_packet(alice, bob.address6, UDP, udp_datagram(1, 2), sender=IPv6Address("::"))
    assert dropped_with(node, alice, zero) == 132


@pytest.mark.parametrize(
    ("first", "chain", "reason"),
    [
        (HOP, extension(UDP), 0),
        (HOP, extension(ROUTING) + extension(OPTIONS, b"\4\0" + bytes(4)) + extension(UDP), 0),
        (OPTIONS, extension(UDP, bytes(30)), 0),
        (AH, struct.pack("!2B2x2I", UDP, 4, 7, 1) + bytes(12), 0),
        (OPTIONS, extension(HOP) + extension(UDP), 156),
        (ROUTING, extension(UDP, b"\0\1" + bytes(4)), 156),
        (ROUTING, extension(UDP, b"\4\1" + bytes(4)), 156),
        (OPTIONS, extension(OPTIONS) * 8 + extension(UDP), 156),
        (OPTIONS, bytes([UDP, 200]) + bytes(6), 156),
        (OPTIONS, bytes([UDP, 1]), 156),
    ],
    ids=lambda value: str(value)[:24] if not isinstance(value, bytes) else value.hex()[:16],
)
def test_extension_headers_are_walked_or_refused(
    node: KernelNode, alice: Workload, bob: Workload, first: int, chain: bytes, reason: int
) -> None:
    """Walked: the port behind them is judged."""
    rows = {0: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 5000, UDP): answer(ALLOW, 61)})
    node.place(bob, slot_in=7)
    tail = b"" if len(chain) < 8 else udp_datagram(4000, 5000)
    packet = ipv6_packet(alice, bob.address6, first, chain + tail)
    assert dropped_with(node, alice, packet) == reason
    if not reason:
        closed = ipv6_packet(alice, bob.address6, first, chain + udp_datagram(4000, 5001))
        assert dropped_with(node, alice, closed) == 133


def test_what_has_no_ports_is_judged_by_the_peer_alone(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    for proto in (ESP, NOTHING, 132 + 1):
        packet = ipv6_packet(alice, bob.address6, proto, bytes(16))
        node.policy(7, {1001: peer(ALLOW, 31)})
        node.place(bob, slot_in=7)
        assert dropped_with(node, alice, packet) == 0
        node.policy(7, {1001: peer(NONE)})
        assert dropped_with(node, alice, packet) == 133


def test_truncated_and_mislabelled_packets_are_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    whole = ipv6_packet(alice, bob.address6, TCP, tcp_segment(1, 2))
    assert dropped_with(node, alice, whole) == 0
    assert dropped_with(node, alice, whole[:60]) == 134
    assert dropped_with(node, alice, whole[:14] + b"\x40" + whole[15:]) == 134
    short = ipv6_packet(alice, bob.address6, TCP, tcp_segment(1, 2)[:19])
    assert dropped_with(node, alice, short) == 135
    with alice.ns.socket(socket.SOCK_RAW, family=socket.AF_PACKET) as sock:
        alice.ns.call(lambda: sock.bind(("eth0", 0x86DD)))
        sock.send(whole[:40])  # the frame ends inside the IP header
    assert [drop[0] for drop in node.drops()] == [134]
    other_family = ipv6_packet(alice, bob.address6, 1, b"\x08\0\0\0\0\1\0\1")
    assert dropped_with(node, alice, other_family) == 137


# ------------------------------------------------------------------ neighbours


def solicit(w: Workload, target: IPv6Address, *, sender: IPv6Address, hops: int = 255) -> bytes:
    body = b"\x87\0\0\0\0\0\0\0" + target.packed + b"\1\1" + w.link.mac
    return ipv6_packet(w, IPv6Address("ff02::1:ff00:1"), ICMP6, body, hops=hops, sender=sender)


def advert(w: Workload, target: IPv6Address, mac: bytes, sender: IPv6Address) -> bytes:
    body = b"\x88\0\0\0\x60\0\0\0" + target.packed + b"\2\1" + mac
    return ipv6_packet(w, GATEWAY6, ICMP6, body, hops=255, sender=sender)


def test_an_endpoint_that_asks_for_its_gateway_is_answered(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    alice.ns.ip(f"-6 neigh del {GATEWAY6} dev eth0")
    try:
        with bob.ns.listen(80, "::"):
            assert alice.ns.can_connect(bob.ip6, 80)
        found = alice.ns.ip(f"-6 neigh show {GATEWAY6} dev eth0")
        assert alice.link.host_mac.hex(":") in found
        assert "router" in found
    finally:
        mac = alice.link.host_mac.hex(":")
        alice.ns.ip(f"-6 neigh replace {GATEWAY6} lladdr {mac} dev eth0 nud permanent")
    assert node.drops() == []


def test_who_asks_for_anybody_else_or_from_afar_is_not_answered(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    own = alice.address6
    assert node.inject(alice, solicit(alice, GATEWAY6, sender=own)) == REDIRECTED
    assert dropped_with(node, alice, solicit(alice, bob.address6, sender=own)) == 176
    assert dropped_with(node, alice, solicit(alice, GATEWAY6, sender=own, hops=64)) == 176


def test_nobody_speaks_for_another_address_or_as_a_router(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    mac, own = alice.link.mac, alice.address6
    assert node.inject(alice, advert(alice, own, mac, own)) == PASSED
    assert dropped_with(node, alice, advert(alice, bob.address6, mac, own)) == 176
    assert dropped_with(node, alice, advert(alice, own, bob.link.mac, own)) == 176
    assert dropped_with(node, alice, advert(alice, own, mac, bob.address6)) == 176
    assert dropped_with(node, alice, advert(alice, GATEWAY6, mac, GATEWAY6)) == 176
    afar = advert(alice, own, mac, own)
    afar = afar[:38] + REMOTE6.packed + afar[54:]
    assert dropped_with(node, alice, afar) == 176
    for kind in (134, 137):
        body = bytes([kind, 0, 0, 0]) + bytes(36)
        packet = ipv6_packet(alice, ALL_NODES, ICMP6, body, hops=255, sender=LINK_LOCAL)
        assert dropped_with(node, alice, packet) == 176


def test_a_links_chatter_is_counted_and_not_reported(node: KernelNode, alice: Workload) -> None:
    before = node.counted(EGRESS, 176), node.counted(EGRESS, 132)
    for body in (b"\x85\0\0\0\0\0\0\0", b"\x8f\0\0\0\0\0\0\0"):
        packet = ipv6_packet(alice, ALL_NODES, ICMP6, body, hops=255, sender=LINK_LOCAL)
        assert node.inject(alice, packet) == DROPPED
    taken = solicit(alice, alice.address6, sender=IPv6Address("::"))
    assert node.inject(alice, taken) == DROPPED
    name = ipv6_packet(
        alice, IPv6Address("ff02::fb"), UDP, udp_datagram(5353, 5353), sender=LINK_LOCAL
    )
    assert node.inject(alice, name) == DROPPED
    assert node.events() == []
    assert node.counted(EGRESS, 176) == before[0] + 3
    assert node.counted(EGRESS, 132) == before[1] + 1


@pytest.mark.parametrize(
    ("kind", "sender", "hops", "mark", "passes"),
    [
        (135, LINK_LOCAL, 255, 0, True),
        (136, LINK_LOCAL, 255, 0, True),
        (135, LINK_LOCAL, 254, 0, False),
        (136, REMOTE6, 255, 0, False),
        (136, LINK_LOCAL, 255, 0x100, False),
        (134, LINK_LOCAL, 255, 0, False),
        (137, LINK_LOCAL, 255, 0, False),
    ],
)
def test_only_the_host_speaks_of_neighbours_to_an_endpoint(
    node: KernelNode,
    alice: Workload,
    kind: int,
    sender: IPv6Address,
    hops: int,
    mark: int,
    passes: bool,
) -> None:
    body = bytes([kind, 0, 0, 0]) + bytes(36)
    packet = ipv6_packet(alice, alice.address6, ICMP6, body, hops=hops, sender=sender)
    done = node.run(alice, packet, program="to_endpoint", mark=mark)
    assert (done.result == PASSED) is passes
    assert node.events() == []
