"""Packets between real namespaces, judged by rows written here."""

from __future__ import annotations

import socket

import pytest

from datapath.maps.layout import (
    EventType,
    IpcacheEntry,
    MatchType,
    PeerFlags,
    PolicyPortKey,
    PolicyRangeKey,
    Prefix4,
    Verdict,
)
from tests.fakes.kernel_node import (
    HOST_IDENTITY,
    NODE,
    REMOTE,
    REMOTE_IDENTITY,
    KernelNode,
    Workload,
    answer,
    peer,
)

pytestmark = pytest.mark.kernel

ALLOW, DENY, NONE = Verdict.ALLOW, Verdict.DENY, Verdict.NONE
INGRESS, EGRESS = 1, 2
TCP, UDP, ICMP = 6, 17, 1


def test_without_policy_everything_passes(node: KernelNode, alice: Workload, bob: Workload) -> None:
    with bob.ns.listen(80):
        assert alice.ns.can_connect(bob.ip, 80)
    verdicts = node.events(EventType.VERDICT)
    assert [(e.direction, e.verdict, e.rule_id) for e in verdicts] == [
        (EGRESS, ALLOW, 1),
        (INGRESS, ALLOW, 1),
    ]
    first = verdicts[0]
    assert (str(first.source), str(first.destination)) == (alice.ip, bob.ip)
    assert (first.src_identity, first.dst_identity) == (1001, 1002)
    assert (first.proto, first.dport, first.tcp_flags) == (TCP, 80, 2)
    assert [e.endpoint for e in verdicts] == [alice.id, bob.id]


def test_an_allowed_peer_passes_and_its_rule_is_named(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80):
        assert alice.ns.can_connect(bob.ip, 80)
    ingress = [e for e in node.events(EventType.VERDICT) if e.direction == INGRESS]
    assert [(e.rule_id, e.match) for e in ingress] == [(31, MatchType.L3)]


def test_an_unlisted_peer_is_dropped_by_default(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1003: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80):
        assert not alice.ns.can_connect(bob.ip, 80)
    assert set(node.drops()) == {(133, INGRESS, 2)}
    assert node.tables.ct.count() == 0


def test_an_explicit_deny_names_its_rule(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.policy(7, {1002: peer(DENY, 44)})
    node.place(alice, slot_out=7)
    with bob.ns.listen(80):
        assert not alice.ns.can_connect(bob.ip, 80)
    events = node.events()
    assert {(e.reason, e.direction, e.rule_id) for e in events if e.dropped} == {(181, EGRESS, 44)}
    assert {(e.verdict, e.rule_id) for e in events if e.type == EventType.VERDICT} == {(DENY, 44)}


def test_both_ends_must_allow(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.policy(7, {1002: peer(ALLOW, 20)})
    node.policy(8, {})
    node.place(alice, slot_out=7)
    node.place(bob, slot_in=8)
    with bob.ns.listen(80):
        assert not alice.ns.can_connect(bob.ip, 80)
        assert set(node.drops()) == {(133, INGRESS, 2)}
        node.policy(8, {1001: peer(ALLOW, 21)})
        assert alice.ns.can_connect(bob.ip, 80)


def test_replies_need_no_policy_of_their_own(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    node.place(alice, slot_in=8)
    with bob.ns.listen(80) as listener:
        client = alice.ns.connect(bob.ip, 80)
        server, _ = listener.accept()
        server.sendall(b"hello")
        assert client.recv(5) == b"hello"
        assert not bob.ns.can_connect(alice.ip, 9)
        client.close()
        server.close()


def test_a_port_row_answers_before_the_peers_own_answer(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 80, TCP): answer(ALLOW, 61)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80), bob.ns.listen(81):
        assert alice.ns.can_connect(bob.ip, 80)
        assert not alice.ns.can_connect(bob.ip, 81)
    ingress = [e for e in node.events(EventType.VERDICT) if e.direction == INGRESS]
    assert (ingress[0].rule_id, ingress[0].match) == (61, MatchType.L3_L4)
    assert (ingress[-1].verdict, ingress[-1].rule_id) == (NONE, 2)


def test_a_denied_port_in_an_allowed_peer(node: KernelNode, alice: Workload, bob: Workload) -> None:
    rows = {1001: peer(ALLOW, 60, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 81, TCP): answer(DENY, 62)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80), bob.ns.listen(81):
        assert alice.ns.can_connect(bob.ip, 80)
        assert not alice.ns.can_connect(bob.ip, 81)
    assert set(node.drops()) == {(181, INGRESS, 62)}


def test_a_port_range_covers_exactly_its_block(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=6, flags=PeerFlags.HAS_RANGES)}
    ranges = {PolicyRangeKey(40 + 12, 6, TCP, 8080): answer(ALLOW, 63)}
    node.policy(7, rows, ranges=ranges)
    node.place(bob, slot_in=7)
    with bob.ns.listen(8095), bob.ns.listen(8096), bob.ns.listen(8079):
        assert alice.ns.can_connect(bob.ip, 8095)
        assert not alice.ns.can_connect(bob.ip, 8096)
        assert not alice.ns.can_connect(bob.ip, 8079)


def test_a_whole_protocol_is_a_range_without_port_bits(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=6, flags=PeerFlags.HAS_RANGES)}
    node.policy(7, rows, ranges={PolicyRangeKey(40, 6, UDP, 0): answer(ALLOW, 64)})
    node.place(bob, slot_in=7)
    with bob.ns.udp(5353) as server, alice.ns.udp() as client, bob.ns.listen(5353):
        client.sendto(b"x", (bob.ip, 5353))
        assert server.recv(8) == b"x"
        assert not alice.ns.can_connect(bob.ip, 5353)


def test_the_row_of_identity_0_answers_for_everyone_unlisted(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {0: peer(ALLOW, 65), 1003: peer(DENY, 66)}
    node.policy(7, rows)
    node.place(bob, slot_in=7)
    with bob.ns.listen(80):
        assert alice.ns.can_connect(bob.ip, 80)
        verdicts = node.events(EventType.VERDICT)
        assert (verdicts[-1].rule_id, verdicts[-1].match) == (65, MatchType.ALL)
        node.place(alice, identity=1003)
        assert not alice.ns.can_connect(bob.ip, 80)


def test_icmp_is_judged_by_type(node: KernelNode, alice: Workload, bob: Workload) -> None:
    rows = {1001: peer(NONE, class_id=9, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(9, 8, ICMP): answer(ALLOW, 67)})
    node.place(bob, slot_in=7)
    assert alice.ns.ping(bob.ip)
    node.policy(7, rows, {PolicyPortKey(9, 8, ICMP): answer(DENY, 68)})
    assert not alice.ns.ping(bob.ip)
    drop = node.events(EventType.DROP)[-1]
    assert (drop.proto, drop.sport, drop.dport, drop.rule_id) == (ICMP, 8, 0, 68)


def test_an_allowed_ping_is_no_leave_to_ping_back(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {})
    node.place(alice, slot_in=7)
    for ident in (77, 8):  # 8: also the number that stands for "the other port" of an echo
        assert alice.ns.ping(bob.ip, ident=ident)
        assert not bob.ns.ping(alice.ip, ident=ident)


def test_a_refused_udp_port_is_reported_back_although_nothing_allows_icmp(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=9, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(9, 9, UDP): answer(ALLOW, 67)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    node.place(alice, slot_in=8)
    with alice.ns.udp() as client:
        client.connect((bob.ip, 9))
        client.send(b"x")
        with pytest.raises(ConnectionRefusedError):
            client.recv(8)
    assert node.drops() == []


def test_the_host_reaches_an_endpoint_that_allows_it(node: KernelNode, bob: Workload) -> None:
    node.policy(7, {HOST_IDENTITY: peer(ALLOW, 3)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80):
        assert node.ns.can_connect(bob.ip, 80)
        assert not node.remote.can_connect(bob.ip, 80)
        node.policy(7, {HOST_IDENTITY: peer(DENY, 30)})
        assert not node.ns.can_connect(bob.ip, 80)
    assert (181, INGRESS, 30) in node.drops()


def test_an_endpoint_reaches_the_host_and_the_network_only_if_allowed(
    node: KernelNode, alice: Workload
) -> None:
    node.policy(7, {HOST_IDENTITY: peer(ALLOW, 70)})
    node.place(alice, slot_out=7)
    with node.ns.listen(80, str(NODE)), node.remote.listen(80):
        assert alice.ns.can_connect(str(NODE), 80)
        assert not alice.ns.can_connect(str(REMOTE), 80)
        assert set(node.drops()) == {(133, EGRESS, 2)}
        node.policy(7, {REMOTE_IDENTITY: peer(ALLOW, 71)})
        assert alice.ns.can_connect(str(REMOTE), 80)


def test_the_network_reaches_an_endpoint_by_the_longest_prefix(
    node: KernelNode, bob: Workload
) -> None:
    node.tables.ipcache4_prefix.put_many({Prefix4(24, int(REMOTE) & ~0xFF): IpcacheEntry(16777300)})
    node.policy(7, {REMOTE_IDENTITY: peer(ALLOW, 72), 16777300: peer(DENY, 73)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80):
        assert node.remote.can_connect(bob.ip, 80)
        node.tables.ipcache4_prefix.delete_many([Prefix4(32, int(REMOTE))])
        assert not node.remote.can_connect(bob.ip, 80)
    assert set(node.drops()) == {(181, INGRESS, 73)}


def test_an_unknown_address_is_the_world(node: KernelNode, bob: Workload) -> None:
    node.tables.ipcache4_prefix.delete_many([Prefix4(32, int(REMOTE))])
    node.policy(7, {2: peer(ALLOW, 74)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80):
        assert node.remote.can_connect(bob.ip, 80)
    assert node.events(EventType.VERDICT)[0].src_identity == 2


def test_an_endpoint_that_is_not_ready_neither_sends_nor_receives(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.place(bob, ready=False)
    with bob.ns.listen(80), alice.ns.listen(80):
        assert not alice.ns.can_connect(bob.ip, 80)
        assert set(node.drops()) == {(203, INGRESS, 0)}
        assert not node.ns.can_connect(bob.ip, 80)
        assert set(node.drops()) == {(203, INGRESS, 0)}
        assert not bob.ns.can_connect(alice.ip, 80)
        assert set(node.drops()) == {(203, EGRESS, 0)}
        node.place(bob)
        assert alice.ns.can_connect(bob.ip, 80)


def test_a_forged_source_address_is_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    alice.ns.ip("addr add 10.78.0.99/32 dev eth0")
    try:
        with alice.ns.socket(socket.SOCK_DGRAM) as sock:
            sock.bind(("10.78.0.99", 0))
            sock.sendto(b"x", (bob.ip, 53))
    finally:
        alice.ns.ip("addr del 10.78.0.99/32 dev eth0")
    assert node.drops() == [(132, EGRESS, 0)]


def test_an_unknown_protocol_is_judged_by_the_peer_alone(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    with (
        alice.ns.socket(socket.SOCK_RAW, 47) as sender,
        bob.ns.socket(socket.SOCK_RAW, 47) as receiver,
    ):
        receiver.settimeout(0.5)
        node.policy(7, {1001: peer(ALLOW, 80)})
        node.place(bob, slot_in=7)
        sender.sendto(b"\0" * 8, (bob.ip, 0))
        assert len(receiver.recv(64)) == 28
        node.policy(7, {1001: peer(NONE)})
        sender.sendto(b"\0" * 8, (bob.ip, 0))
        with pytest.raises(TimeoutError):
            receiver.recv(64)


def test_every_packet_is_counted_by_reason_and_direction(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    def packets(reason: int, direction: int) -> int:
        row = node.tables.metrics.get(reason * 2 + direction - 1)
        assert row is not None
        return row.packets

    before = packets(0, EGRESS), packets(0, INGRESS), packets(133, INGRESS)
    with bob.ns.udp(5000) as server, alice.ns.udp() as client:
        client.sendto(b"x", (bob.ip, 5000))
        server.recv(8)
        node.policy(7, {})
        node.place(bob, slot_in=7)
        client.sendto(b"x", (bob.ip, 5000))
    after = packets(0, EGRESS), packets(0, INGRESS), packets(133, INGRESS)
    assert [b - a for a, b in zip(before, after, strict=True)] == [1, 1, 1]


def test_a_redirect_without_a_proxy_drops(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.policy(7, {1001: peer(Verdict.REDIRECT, 90)})
    node.place(bob, slot_in=7)
    assert not alice.ns.can_connect(bob.ip, 80, timeout_s=0.1)
    assert set(node.drops()) == {(205, INGRESS, 90)}
