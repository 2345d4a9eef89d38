"""What a tracked flow may do, and when it may not any more."""

from __future__ import annotations

import dataclasses
import socket
import struct

import pytest

from datapath.maps.flows import CtEntry, CtFlags, CtKey
from datapath.maps.layout import EventType, IpcacheEntry, PeerFlags, PolicyPortKey, Prefix4, Verdict
from tests.fakes.kernel_node import (
    REMOTE,
    REMOTE_IDENTITY,
    KernelNode,
    Workload,
    answer,
    peer,
)
from tests.fakes.packets import DROPPED, REDIRECTED, tcp_packet, udp_packet

pytestmark = pytest.mark.kernel

ALLOW, DENY, NONE = Verdict.ALLOW, Verdict.DENY, Verdict.NONE
INGRESS, EGRESS = 1, 2
TCP, UDP = 6, 17


def connected(
    node: KernelNode, client: Workload, server: Workload, port: int = 80
) -> tuple[socket.socket, socket.socket]:
    with server.ns.listen(port) as listener:
        near = client.ns.connect(server.ip, port)
        far, _ = listener.accept()
    for end in (near, far):
        end.settimeout(0.5)
        abort_on_close(end)
    return near, far


def abort_on_close(sock: socket.socket) -> None:
    """Closing resets: no retransmission of this connection disturbs the next test."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("=ii", 1, 0))


def only_flow(node: KernelNode) -> tuple[CtKey, CtEntry]:
    rows = list(node.tables.ct.items())
    assert len(rows) == 1
    return rows[0]


def test_a_known_flow_is_not_judged_again(node: KernelNode, alice: Workload, bob: Workload) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    near, far = connected(node, alice, bob)
    with near, far:
        node.events()
        for _ in range(3):
            near.sendall(b"ping")
            assert far.recv(8) == b"ping"
            far.sendall(b"pong")
            assert near.recv(8) == b"pong"
        assert node.events() == []
        _, entry = only_flow(node)
    assert (entry.src_identity, entry.dst_identity) == (1001, 1002)
    assert (entry.ingress.slot, entry.ingress.rule_id) == (7, 31)
    assert (entry.egress.slot, entry.egress.rule_id) == (0, 1)
    assert entry.packets[0] >= 5
    assert entry.packets[1] >= 4


def test_a_removed_allow_cuts_a_live_connection_and_its_replies(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    near, far = connected(node, alice, bob)
    with near, far:
        node.policy(7, {1001: peer(NONE)})
        near.sendall(b"x")
        with pytest.raises(TimeoutError):
            far.recv(8)
        assert node.tables.ct.count() == 0
        far.sendall(b"y")
        with pytest.raises(TimeoutError):
            near.recv(8)
    drops = node.drops()
    assert (133, INGRESS, 2) in drops
    assert (133, EGRESS, 2) in drops


def test_a_removed_egress_allow_cuts_a_connection_to_the_network(
    node: KernelNode, alice: Workload
) -> None:
    node.policy(7, {REMOTE_IDENTITY: peer(ALLOW, 31)})
    node.place(alice, slot_out=7, slot_in=0)
    with node.remote.listen(80) as listener:
        near = alice.ns.connect(str(REMOTE), 80)
        far, _ = listener.accept()
    far.settimeout(0.3)
    with near, far:
        near.sendall(b"x")
        assert far.recv(8) == b"x"
        node.policy(7, {REMOTE_IDENTITY: peer(DENY, 32)})
        near.sendall(b"y")
        with pytest.raises(TimeoutError):
            far.recv(8)
        assert node.tables.ct.count() == 0
    assert (181, EGRESS, 32) in node.drops()


def test_a_slot_flip_applies_to_live_connections(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.policy(8, {1001: peer(ALLOW, 41)})
    node.policy(9, {1001: peer(DENY, 51)})
    node.place(bob, slot_in=7)
    near, far = connected(node, alice, bob)
    with near, far:
        node.events()
        node.place(bob, slot_in=8)
        near.sendall(b"x")
        assert far.recv(8) == b"x"
        judged = node.events(EventType.VERDICT)
        assert [(e.direction, e.verdict, e.rule_id) for e in judged] == [(INGRESS, ALLOW, 41)]
        node.place(bob, slot_in=9)
        near.sendall(b"y")
        with pytest.raises(TimeoutError):
            far.recv(8)
    assert (181, INGRESS, 51) in node.drops()


def test_opening_and_closing_a_direction_applies_to_live_connections(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {})
    near, far = connected(node, alice, bob)
    with near, far:
        node.place(bob, slot_in=7)
        near.sendall(b"x")
        with pytest.raises(TimeoutError):
            far.recv(8)
        node.place(bob)
        assert far.recv(8) == b"x"  # retransmitted: judged as a new flow, mid-stream


def test_a_changed_identity_is_judged_again_at_both_ends(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    near, far = connected(node, alice, bob)
    with near, far:
        node.place(alice, identity=1009)
        near.sendall(b"x")
        with pytest.raises(TimeoutError):
            far.recv(8)
    assert (133, INGRESS, 2) in node.drops()


def test_a_changed_identity_of_a_remote_peer_is_judged_again(
    node: KernelNode, bob: Workload
) -> None:
    node.policy(7, {REMOTE_IDENTITY: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.listen(80) as listener:
        near = node.remote.connect(bob.ip, 80)
        far, _ = listener.accept()
    far.settimeout(0.3)
    with near, far:
        node.tables.ipcache4_prefix.put_many({Prefix4(32, int(REMOTE)): IpcacheEntry(16777400)})
        near.sendall(b"x")
        with pytest.raises(TimeoutError):
            far.recv(8)


def test_a_flow_through_the_stack_is_judged_at_both_ends(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    node.tables.local4.delete_many([int(bob.address)])
    near, far = connected(node, alice, bob)
    with near, far:
        _, entry = only_flow(node)
        assert (entry.egress.rule_id, entry.ingress.rule_id) == (1, 31)
        node.policy(7, {1001: peer(DENY, 32)})
        near.sendall(b"x")
        with pytest.raises(TimeoutError):
            far.recv(8)
        assert (181, INGRESS, 32) in node.drops()


def test_a_changed_identity_is_noticed_by_the_second_judge_on_the_way(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    node.tables.local4.delete_many([int(bob.address)])
    near, far = connected(node, alice, bob)
    with near, far:
        node.place(alice, identity=1009)  # the first judge rewrites the flow's identities
        near.sendall(b"x")
        with pytest.raises(TimeoutError):
            far.recv(8)
    assert (133, INGRESS, 2) in node.drops()


def test_the_answering_side_may_not_open_a_connection_of_its_own_on_the_same_ports(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(8, {})
    node.place(alice, slot_in=8)
    near, far = connected(node, alice, bob)
    with near, far:
        port = near.getsockname()[1]
        node.events()
        syn = tcp_packet(bob, alice, 80, port, flags=0x02)
        assert node.inject(bob, syn) == DROPPED
        assert set(node.drops()) == {(133, INGRESS, 2)}
        near.sendall(b"x")
        assert far.recv(8) == b"x"


def test_ports_used_again_after_a_close_are_judged_anew(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    with bob.ns.listen(80) as listener:
        near = alice.ns.connect(bob.ip, 80, source_port=40001)
        far, _ = listener.accept()
        abort_on_close(near)  # no TIME_WAIT that would refuse the port
        near.close()
        far.close()
        _, entry = only_flow(node)
        assert entry.flags & CtFlags.RST
        node.events()
        alice.ns.connect(bob.ip, 80, source_port=40001).close()
        judged = [e for e in node.events(EventType.VERDICT) if e.tcp_flags == 2]
        assert [e.direction for e in judged] == [EGRESS, INGRESS]


def test_a_closed_connection_is_marked_closing(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    near, far = connected(node, alice, bob)
    _, entry = only_flow(node)
    assert not entry.flags & (CtFlags.FIN_FWD | CtFlags.FIN_REV | CtFlags.RST | CtFlags.SYN_ONLY)
    with near, far:
        near.shutdown(socket.SHUT_WR)
        assert far.recv(8) == b""
        far.shutdown(socket.SHUT_WR)
        assert near.recv(8) == b""
        _, entry = only_flow(node)
    assert entry.flags & CtFlags.FIN_FWD
    assert entry.flags & CtFlags.FIN_REV


@pytest.mark.parametrize(
    ("proto", "flags", "idle_s", "alive"),
    [
        (TCP, CtFlags.REPLY_SEEN, 6 * 3600 - 60, True),
        (TCP, CtFlags.REPLY_SEEN, 6 * 3600 + 60, False),
        (TCP, CtFlags.REPLY_SEEN | CtFlags.RST, 5, True),
        (TCP, CtFlags.REPLY_SEEN | CtFlags.FIN_FWD | CtFlags.FIN_REV, 20, False),
        (TCP, CtFlags.SYN_ONLY, 70, False),
        (UDP, CtFlags(0), 50, True),
        (UDP, CtFlags(0), 70, False),
        (UDP, CtFlags.REPLY_SEEN, 170, True),
        (UDP, CtFlags.REPLY_SEEN, 190, False),
    ],
)
def test_an_idle_flow_is_forgotten_in_time(
    node: KernelNode,
    alice: Workload,
    bob: Workload,
    proto: int,
    flags: CtFlags,
    idle_s: int,
    alive: bool,
) -> None:
    """Alive: bob's packet passes as a reply although nothing allows bob to speak first."""
    opening, answering = udp_packet(alice, bob, 4000, 80), udp_packet(bob, alice, 80, 4000)
    if proto == TCP:
        opening = tcp_packet(alice, bob, 4000, 80)
        answering = tcp_packet(bob, alice, 80, 4000, flags=0x10)
    assert node.inject(alice, opening) == REDIRECTED
    key, entry = only_flow(node)
    aged = dataclasses.replace(
        entry,
        last_seen_ns=(entry.last_seen_ns - idle_s * 10**9) % 2**64,
        flags=(entry.flags & CtFlags.INITIATOR_1) | flags,
    )
    node.tables.ct.put_many({key: aged})
    node.policy(8, {})
    node.place(bob, slot_out=8)
    assert (node.inject(bob, answering) == REDIRECTED) is alive


def test_udp_answers_pass_only_to_who_asked(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {1001: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(7, rows, {PolicyPortKey(5, 53, UDP): answer(ALLOW, 61)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    with bob.ns.udp(53) as server, alice.ns.udp() as client, alice.ns.udp() as other:
        client.sendto(b"q", (bob.ip, 53))
        _, asker = server.recvfrom(8)
        server.sendto(b"a", asker)
        assert client.recv(8) == b"a"
        server.sendto(b"a", (alice.ip, other.getsockname()[1]))
        with pytest.raises(TimeoutError):
            other.recv(8)
    assert node.drops() == [(133, EGRESS, 2)]


def test_a_packet_without_a_flow_is_judged_by_policy_whatever_its_flags(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    assert node.inject(alice, tcp_packet(alice, bob, 4000, 80, flags=0x10)) == REDIRECTED
    judged = [e for e in node.events(EventType.VERDICT) if e.direction == INGRESS]
    assert [(e.rule_id, e.tcp_flags) for e in judged] == [(31, 0x10)]
