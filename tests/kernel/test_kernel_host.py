"""The host firewall: the node as one end of a connection."""

from __future__ import annotations

import socket
from ipaddress import IPv6Address

import pytest

from datapath.maps.layout import (
    ControlKey,
    EndpointFlags,
    EventType,
    IpcacheEntry,
    Node,
    PeerFlags,
    PolicyPortKey,
    Verdict,
    mapped,
)
from tests.fakes.kernel_node import (
    NODE,
    REMOTE,
    REMOTE_IDENTITY,
    KernelNode,
    Workload,
    answer,
    peer,
)
from tests.fakes.packets import DROPPED, UDP, ipv6_packet, udp_datagram

pytestmark = pytest.mark.kernel

ALLOW, DENY, NONE = Verdict.ALLOW, Verdict.DENY, Verdict.NONE
INGRESS, EGRESS = 1, 2
TCP = 6
CONTROL_RULE = 5
VXLAN = 8472


@pytest.fixture
def firewalled(node: KernelNode) -> KernelNode:
    """The node lets the network reach its port 80, and reaches the network's."""
    rows = {REMOTE_IDENTITY: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    node.policy(20, rows, {PolicyPortKey(5, 80, TCP): answer(ALLOW, 61)})
    node.policy(21, rows)
    node.place_host(slot_in=20, slot_out=21)
    node.uplink()
    return node


ADDRESSES = pytest.mark.parametrize(
    ("here", "there"), [("10.77.0.1", "10.77.0.2"), ("fd00:77::1", "fd00:77::2")]
)


@ADDRESSES
def test_both_directions_of_the_node_are_judged(
    firewalled: KernelNode, here: str, there: str
) -> None:
    node, anywhere = firewalled, "::" if ":" in here else "0.0.0.0"
    with node.ns.listen(80, anywhere) as listener, node.ns.listen(81, anywhere):
        with node.remote.connect(here, 80) as near:
            far, _ = listener.accept()
            with far:
                far.sendall(b"hello")
                assert near.recv(8) == b"hello"
        assert not node.remote.can_connect(here, 81, timeout_s=0.2)
    with node.remote.listen(80, anywhere), node.remote.listen(81, anywhere):
        assert node.ns.can_connect(there, 80)
        assert not node.ns.can_connect(there, 81, timeout_s=0.2)
    judged = {(e.direction, e.reason, e.dport, e.endpoint) for e in node.events(EventType.DROP)}
    assert judged == {(INGRESS, 133, 81, 99), (EGRESS, 133, 81, 99)}


def test_without_a_row_the_node_is_not_judged(node: KernelNode) -> None:
    node.uplink()
    with node.ns.listen(81), node.remote.listen(82):
        assert node.remote.can_connect(str(NODE), 81)
        assert node.ns.can_connect(str(REMOTE), 82)
    assert node.events() == []
    assert node.tables.ct.count() == 0


def test_what_passes_through_is_judged_at_its_endpoint_alone(
    firewalled: KernelNode, alice: Workload, bob: Workload
) -> None:
    with bob.ns.listen(443), firewalled.remote.listen(444):
        assert firewalled.remote.can_connect(bob.ip, 443)
        assert alice.ns.can_connect(str(REMOTE), 444)
    assert firewalled.drops() == []


def test_endpoints_and_their_node_are_judged_at_both_ends(
    firewalled: KernelNode, alice: Workload
) -> None:
    node = firewalled
    with node.ns.listen(80), alice.ns.listen(80):
        assert not alice.ns.can_connect(str(NODE), 80, timeout_s=0.2)
        assert not node.ns.can_connect(alice.ip, 80, timeout_s=0.2)
        assert {(e.direction, e.endpoint) for e in node.events(EventType.DROP)} == {
            (INGRESS, 99),
            (EGRESS, 99),
        }
        node.policy(20, {1001: peer(ALLOW, 71)})
        node.policy(21, {1001: peer(ALLOW, 72)})
        assert alice.ns.can_connect(str(NODE), 80)
        assert node.ns.can_connect(alice.ip, 80)
        judged = {(e.direction, e.rule_id) for e in node.events(EventType.VERDICT)}
        assert judged == {(EGRESS, 1), (INGRESS, 71), (EGRESS, 72), (INGRESS, 1)}


@pytest.mark.parametrize("anybody", [True, False])
def test_the_control_channel_is_never_stopped(firewalled: KernelNode, anybody: bool) -> None:
    node = firewalled
    node.policy(20, {0: peer(DENY, 81)})
    node.policy(21, {0: peer(DENY, 82)})
    who = 0 if anybody else mapped(REMOTE)
    node.tables.control.put_many(
        {
            ControlKey(who, 22, TCP, INGRESS): CONTROL_RULE,
            ControlKey(who, 7403, TCP, EGRESS): CONTROL_RULE,
        }
    )
    with node.ns.listen(22) as door, node.remote.listen(7403):
        with node.remote.connect(str(NODE), 22) as near:
            far, _ = door.accept()
            with far:
                node.tables.ct.delete_many([key for key, _ in node.tables.ct.items()])
                far.sendall(b"still here")
                assert near.recv(16) == b"still here"
        assert node.ns.can_connect(str(REMOTE), 7403)
        assert not node.remote.can_connect(str(NODE), 7403, timeout_s=0.2)
        assert not node.ns.can_connect(str(REMOTE), 22, timeout_s=0.2)


def test_a_client_the_node_denies_fails_at_once(firewalled: KernelNode) -> None:
    firewalled.place_host(slot_in=20, slot_out=21, flags=EndpointFlags.RESPOND)
    with pytest.raises(ConnectionRefusedError):
        firewalled.remote.connect(str(NODE), 81, timeout_s=2.0)
    with pytest.raises(ConnectionRefusedError):
        firewalled.remote.connect("fd00:77::1", 81, timeout_s=2.0)


def test_a_live_connection_is_cut_when_the_nodes_policy_changes(firewalled: KernelNode) -> None:
    node = firewalled
    with node.ns.listen(80) as listener, node.remote.connect(str(NODE), 80) as near:
        far, _ = listener.accept()
        with far:
            far.settimeout(0.3)
            node.policy(20, {REMOTE_IDENTITY: peer(NONE)})
            near.sendall(b"x")
            with pytest.raises(TimeoutError):
                far.recv(8)


def test_errors_about_the_nodes_own_flows_reach_it(firewalled: KernelNode) -> None:
    node = firewalled
    node.policy(21, {REMOTE_IDENTITY: peer(ALLOW, 91)})
    node.policy(20, {REMOTE_IDENTITY: peer(NONE)})
    with node.ns.udp() as client:
        client.connect((str(REMOTE), 4242))
        client.send(b"nobody listens")
        with pytest.raises(ConnectionRefusedError):
            client.recv(8)


def test_tunnels_of_nodes_pass_and_of_nobody_else(firewalled: KernelNode) -> None:
    node = firewalled
    node.configure(tunnel_port=VXLAN)
    node.policy(20, {0: peer(ALLOW, 91)})
    with node.ns.udp(VXLAN) as inside, node.remote.udp() as sender:
        sender.sendto(b"x", (str(NODE), VXLAN))
        with pytest.raises(TimeoutError):
            inside.recv(8)
        assert node.drops() == [(172, INGRESS, 0)]
        node.policy(20, {})
        node.tables.nodes.put_many({int(REMOTE): Node(6)})
        sender.sendto(b"x", (str(NODE), VXLAN))
        assert inside.recv(8) == b"x"
    assert node.drops() == []


def test_a_link_local_address_is_no_way_around(firewalled: KernelNode, alice: Workload) -> None:
    node = firewalled
    words = node.ns.ip("-6 -o addr show dev up0 scope link").split()
    address = words[words.index("inet6") + 1].split("/")[0]
    with node.ns.udp(5000, "::") as server, node.remote.udp(0, "::") as client:
        index = node.remote.call(lambda: socket.if_nametoindex("eth0"))
        client.sendto(b"x", (address, 5000, 0, index))
        with pytest.raises(TimeoutError):
            server.recv(8)
    near = ipv6_packet(alice, IPv6Address("fe80::77"), UDP, udp_datagram(4000, 5000))
    assert node.inject(alice, near) == DROPPED
    drops = node.events(EventType.DROP)
    assert {(e.reason, e.endpoint, e.dport) for e in drops} == {(133, 99, 5000)}


@pytest.mark.parametrize("tags", [1, 2])
def test_a_tag_without_a_vlan_is_no_way_around(firewalled: KernelNode, tags: int) -> None:
    """The stack takes such a tag off, and the packet is the device's own."""
    node = firewalled
    shown = node.ns.ip("-o link show dev up0").split("link/ether ")[1]
    mac = bytes.fromhex(shown[:17].replace(":", ""))
    packet = mac + frame(REMOTE.packed, NODE.packed)[6:]
    tagged = packet[:12] + b"\x81\x00\x20\x00" * tags + packet[12:]
    with (
        node.ns.udp(2) as server,
        node.remote.socket(socket.SOCK_RAW, family=socket.AF_PACKET) as sock,
    ):
        node.remote.call(lambda: sock.bind(("eth0", 0)))
        sock.send(tagged)
        with pytest.raises(TimeoutError):
            server.recv(8)
    assert [drop[:2] for drop in node.drops()] == [(133 if tags == 1 else 166, INGRESS)]


def test_the_nodes_own_address_from_the_network_is_forged(firewalled: KernelNode) -> None:
    node = firewalled
    packet = frame(NODE.packed, NODE.packed)
    index = node.uplink()
    done = node.run_at(index, packet, program="from_netdev")
    assert done.result == 2
    assert node.drops() == [(132, INGRESS, 0)]


def test_an_endpoints_address_from_the_network_is_forged(node: KernelNode, alice: Workload) -> None:
    done = node.run_at(
        node.uplink(), frame(alice.address.packed, REMOTE.packed), program="from_netdev"
    )
    assert done.result == 2
    assert node.drops() == [(132, INGRESS, 0)]


def frame(source: bytes, destination: bytes) -> bytes:
    head = b"\x45\0\0\x1c\0\0\0\0\x40" + bytes([UDP]) + b"\0\0" + source + destination
    return bytes(12) + b"\x08\0" + head + b"\0\1\0\2\0\x08\0\0"


def test_the_host_and_reserved_identities_are_peers_like_others(
    node: KernelNode, alice: Workload
) -> None:
    """world 2, unmanaged 3, health 4, init 5, remote-node 6, kube-apiserver 7."""
    with alice.ns.listen(80):
        for identity in range(2, 8):
            node.tables.ipcache4.put_many({int(REMOTE): IpcacheEntry(identity)})
            node.policy(7, {identity: peer(ALLOW, 31)})
            node.place(alice, slot_in=7)
            assert node.remote.can_connect(alice.ip, 80)
            node.policy(7, {identity: peer(NONE)})
            assert not node.remote.can_connect(alice.ip, 80, timeout_s=0.1)
