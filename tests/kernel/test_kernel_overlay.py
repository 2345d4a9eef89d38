"""Tunnels between nodes: who is believed, and what is carried."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from ipaddress import IPv4Address

import pytest

from datapath.maps.layout import EndpointFlags, EventType, IpcacheEntry, Node, Verdict
from tests.fakes.kernel_node import NODE, REMOTE, KernelNode, Workload, peer
from tests.fakes.netns import checksum
from tests.fakes.overlay import (
    FAR,
    REMOTE_NODE,
    VXLAN,
    OtherNode,
    far_datagram,
    known,
    open_tunnel,
)
from tests.fakes.packets import DROPPED

pytestmark = pytest.mark.kernel

ALLOW, DENY, NONE = Verdict.ALLOW, Verdict.DENY, Verdict.NONE
INGRESS, EGRESS = 1, 2
FAR_IDENTITY = 2001


@pytest.fixture
def other(node: KernelNode) -> Iterator[OtherNode]:
    open_tunnel(node)
    far = OtherNode(node.remote)
    yield far
    far.sock.close()


def drops(node: KernelNode) -> list[tuple[int, int, int]]:
    return [(e.reason, e.direction, e.src_identity) for e in node.events(EventType.DROP)]


def test_an_endpoints_packet_carries_its_identity(
    node: KernelNode, other: OtherNode, alice: Workload
) -> None:
    known(node, int(IPv4Address(FAR)), FAR_IDENTITY)
    node.policy(8, {FAR_IDENTITY: peer(ALLOW, 31)})
    node.place(alice, slot_out=8)
    with alice.ns.udp() as client:
        client.sendto(b"hello", (FAR, 53))
        vni, packet = other.receive()
    assert vni == alice.identity
    assert packet[12:16] == alice.address.packed
    assert packet.endswith(b"hello")
    node.policy(8, {FAR_IDENTITY: peer(DENY, 32)})
    with alice.ns.udp() as client:
        client.sendto(b"hello", (FAR, 53))
        with pytest.raises(TimeoutError):
            other.receive()
    assert drops(node) == [(181, EGRESS, alice.identity)]


def test_what_arrives_is_judged_by_the_identity_it_carries(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    node.policy(7, {FAR_IDENTITY: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.udp(53) as server:
        other.send(FAR_IDENTITY, far_datagram(bob, 4000, 53))
        assert server.recvfrom(8) == (b"x", (FAR, 4000))
        other.send(FAR_IDENTITY + 1, far_datagram(bob, 4001, 53))
        with pytest.raises(TimeoutError):
            server.recv(8)
    assert drops(node) == [(133, INGRESS, FAR_IDENTITY + 1)]


def test_an_answer_goes_back_through_the_tunnel_though_nobody_knows_the_address_yet(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    node.policy(8, {})
    node.place(bob, slot_out=8)
    with bob.ns.udp(53) as server:
        other.send(FAR_IDENTITY, far_datagram(bob, 4000, 53))
        _, sender = server.recvfrom(8)
        server.sendto(b"answer", sender)
        vni, packet = other.receive()
    assert (vni, packet[-6:]) == (bob.identity, b"answer")
    assert node.drops() == []


def test_the_node_itself_speaks_as_host_and_hears_the_other_as_a_node(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    known(node, int(IPv4Address(FAR)), FAR_IDENTITY)
    with node.ns.udp() as client:
        client.sendto(b"hello", (FAR, 53))
        vni, packet = other.receive()
    assert (vni, packet[12:16]) == (1, NODE.packed)
    node.policy(7, {REMOTE_NODE: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.udp(53) as server:
        other.send(1, far_datagram(bob, 4000, 53))
        assert server.recv(8) == b"x"


@pytest.mark.parametrize("vni", [0, 2, 9, 10])
def test_no_node_speaks_for_the_world_or_for_nobody(
    node: KernelNode, other: OtherNode, bob: Workload, vni: int
) -> None:
    with bob.ns.udp(53) as server:
        other.send(vni, far_datagram(bob, 4000, 53))
        with pytest.raises(TimeoutError):
            server.recv(8)
    assert [drop[0] for drop in drops(node)] == [183]


def test_a_tunnel_of_somebody_who_is_no_node_is_not_believed(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    node.tables.nodes.delete_many([int(REMOTE)])
    with bob.ns.udp(53) as server:
        other.send(FAR_IDENTITY, far_datagram(bob, 4000, 53))
        with pytest.raises(TimeoutError):
            server.recv(8)
    assert drops(node) == [(172, INGRESS, 0)]


def test_an_endpoint_reaches_no_tunnel_port(
    node: KernelNode, other: OtherNode, alice: Workload, bob: Workload
) -> None:
    node.tables.nodes.put_many({int(alice.address): Node(REMOTE_NODE)})
    with alice.ns.udp() as client:
        for address in (str(NODE), str(REMOTE)):
            client.sendto(bytes(64), (address, VXLAN))
    assert [drop[:2] for drop in drops(node)] == [(170, EGRESS)] * 2


def test_a_source_of_this_node_comes_through_no_tunnel(
    node: KernelNode, other: OtherNode, alice: Workload, bob: Workload
) -> None:
    for source in (alice.ip, str(NODE)):
        other.send(FAR_IDENTITY, far_datagram(bob, 4000, 53, source=source))
    with bob.ns.udp(53) as server, pytest.raises(TimeoutError):
        server.recv(8)
    assert [drop[0] for drop in drops(node)] == [132, 132]


def test_an_address_behind_a_tunnel_is_forged_where_it_comes_without(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    known(node, int(IPv4Address(FAR)), FAR_IDENTITY)
    node.policy(7, {FAR_IDENTITY: peer(ALLOW, 31)})
    node.place(bob, slot_in=7)
    untunnelled = bytes(12) + b"\x08\0" + far_datagram(bob, 4000, 53)
    for program, at in (("to_endpoint", bob.link.ifindex), ("from_netdev", node.uplink())):
        assert node.run_at(at, untunnelled, program=program).result == DROPPED
    assert [drop[0] for drop in drops(node)] == [132, 132]


def test_a_packet_for_an_address_that_is_not_here_is_dropped(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    packet = far_datagram(bob, 4000, 53)
    other.send(FAR_IDENTITY, packet[:16] + bytes([10, 88, 0, 77]) + packet[20:])
    with bob.ns.udp(53) as server, pytest.raises(TimeoutError):
        server.recv(8)
    assert [drop[0] for drop in drops(node)] == [152]


def test_a_denied_sender_behind_a_tunnel_is_told_through_it(
    node: KernelNode, other: OtherNode, bob: Workload
) -> None:
    node.policy(7, {})
    node.place(bob, slot_in=7, flags=EndpointFlags.RESPOND)
    sent = far_datagram(bob, 4000, 53)
    other.send(FAR_IDENTITY, sent)
    vni, packet = other.receive()
    assert vni == bob.identity
    assert (packet[9], packet[20], packet[21]) == (1, 3, 13)
    assert packet[28:56] == sent[:28]


def test_what_nobody_knows_a_tunnel_for_does_not_leave_by_the_device(
    node: KernelNode, other: OtherNode
) -> None:
    with node.ns.udp() as client:
        client.sendto(b"hello", ("10.88.0.99", 53))
        with pytest.raises(TimeoutError):
            other.receive()
    assert drops(node) == [(160, EGRESS, 1)]


def test_ipv6_endpoints_talk_through_the_same_tunnel(
    node: KernelNode, other: OtherNode, alice: Workload
) -> None:
    far = socket.inet_pton(socket.AF_INET6, "fd00:88::5")
    node.tables.ipcache6.put_many(
        {int.from_bytes(far, "big"): IpcacheEntry(FAR_IDENTITY, int(REMOTE))}
    )
    with alice.ns.udp(0, "::") as client:
        client.sendto(b"hello", ("fd00:88::5", 53))
        vni, packet = other.receive()
        assert (vni, packet[8:24]) == (alice.identity, alice.address6.packed)
        port = client.getsockname()[1]
        back = struct.pack("!4H", 53, port, 13, 0xFFFF) + b"reply"
        head = b"\x60\0\0\0" + struct.pack("!H2B", len(back), 17, 64) + far + alice.address6.packed
        other.send(FAR_IDENTITY, head + with_checksum6(head, back))
        assert client.recv(8) == b"reply"


def with_checksum6(head: bytes, datagram: bytes) -> bytes:
    blank = datagram[:6] + b"\0\0" + datagram[8:]
    pseudo = head[8:40] + struct.pack("!2I", len(datagram), 17)
    found = checksum(pseudo + blank) or 0xFFFF
    return blank[:6] + found.to_bytes(2, "big") + blank[8:]
