"""Endpoints in the world: under the node's address, and back."""

from __future__ import annotations

import socket

import pytest

from datapath.maps.flows import NatDirection
from datapath.maps.layout import ConfigFlags, IpcacheEntry, Prefix4
from tests.fakes.kernel_node import NAT_PORTS, NODE, REMOTE, KernelNode, Workload
from tests.fakes.netns import checksum, icmp_echo
from tests.fakes.packets import (
    ICMP,
    PASSED,
    TCP,
    UDP,
    ipv4_packet,
    sums_up,
    tcp_segment,
    udp_datagram,
    with_sums,
)

pytestmark = pytest.mark.kernel

EGRESS = 2
OTHER_NODE = 6


@pytest.fixture
def world(node: KernelNode) -> KernelNode:
    """The remote end is the world, and knows no way to the endpoints."""
    node.tables.ipcache4_prefix.delete_many([Prefix4(32, int(REMOTE))])
    node.configure(flags=ConfigFlags.MASQUERADE)
    node.uplink()
    return node


@pytest.fixture(autouse=True)
def no_way_back(node: KernelNode) -> object:
    node.remote.ip("route del default")
    yield
    node.remote.ip(f"route add default via {NODE}")


def test_a_connection_to_the_world_comes_from_the_node(world: KernelNode, alice: Workload) -> None:
    with world.remote.listen(80) as listener, alice.ns.connect(str(REMOTE), 80) as near:
        far, (address, port) = listener.accept()
        with far:
            assert address == str(NODE)
            assert NAT_PORTS[0] <= port <= NAT_PORTS[1]
            near.sendall(b"x" * 100_000)
            assert len(far.recv(100_000, socket.MSG_WAITALL)) == 100_000
            far.sendall(b"y" * 100_000)
            near.settimeout(2)
            assert len(near.recv(100_000, socket.MSG_WAITALL)) == 100_000
    assert world.drops() == []


def test_datagrams_and_echoes_come_back(world: KernelNode, alice: Workload, bob: Workload) -> None:
    with world.remote.udp(53) as server, alice.ns.udp() as one, bob.ns.udp() as other:
        seen = set()
        for client in (one, other):
            client.sendto(b"q", (str(REMOTE), 53))
            data, sender = server.recvfrom(64)
            seen.add(sender)
            server.sendto(data + b"a", sender)
            assert client.recv(64) == b"qa"
        assert {address for address, _ in seen} == {str(NODE)}
        assert len(seen) == 2
    assert alice.ns.ping(str(REMOTE), ident=77)
    assert bob.ns.ping(str(REMOTE), ident=77)
    assert world.drops() == []


def test_large_datagrams_go_and_come_in_pieces(world: KernelNode, alice: Workload) -> None:
    with world.remote.udp(53) as server, alice.ns.udp() as client:
        client.sendto(b"q" * 4000, (str(REMOTE), 53))
        data, sender = server.recvfrom(8192)
        assert (len(data), sender[0]) == (4000, str(NODE))
        server.sendto(b"a" * 5000, sender)
        assert len(client.recv(8192)) == 5000


def test_an_error_about_a_masqueraded_packet_reaches_its_sender(
    world: KernelNode, alice: Workload
) -> None:
    with alice.ns.udp() as client:
        client.connect((str(REMOTE), 4242))
        client.send(b"nobody listens")
        with pytest.raises(ConnectionRefusedError):
            client.recv(8)
    assert world.drops() == []


def test_the_hosts_own_connections_are_left_alone(world: KernelNode) -> None:
    with world.remote.listen(80) as listener, world.ns.connect(str(REMOTE), 80) as near:
        far, (address, port) = listener.accept()
        with far:
            assert (address, port) == near.getsockname()
    assert world.tables.nat.count() == 0


@pytest.mark.parametrize("keep", ["excluded", "pod", "node"])
def test_who_knows_endpoints_by_their_addresses_sees_those(
    world: KernelNode, alice: Workload, keep: str
) -> None:
    if keep == "excluded":
        world.tables.masquerade_exclude4.put_many({Prefix4(24, int(REMOTE) & ~0xFF): 1})
    else:
        identity = 1009 if keep == "pod" else OTHER_NODE
        world.tables.ipcache4.put_many({int(REMOTE): IpcacheEntry(identity)})
    world.remote.ip(f"route add {alice.ip}/32 via {NODE}")
    with world.remote.udp(53) as server, alice.ns.udp() as client:
        client.sendto(b"q", (str(REMOTE), 53))
        assert server.recvfrom(64)[1][0] == alice.ip
    world.remote.ip(f"route del {alice.ip}/32")


def test_an_answer_to_who_asked_the_endpoint_itself_keeps_its_address(
    world: KernelNode, bob: Workload
) -> None:
    world.remote.ip(f"route add {bob.ip}/32 via {NODE}")
    with bob.ns.udp(53) as server, world.remote.udp() as client:
        client.sendto(b"q", (bob.ip, 53))
        data, sender = server.recvfrom(64)
        server.sendto(data, sender)
        assert client.recvfrom(64)[1] == (bob.ip, 53)
    world.remote.ip(f"route del {bob.ip}/32")


def test_a_taken_port_is_passed_over_and_a_dead_flows_taken(
    world: KernelNode, alice: Workload, bob: Workload
) -> None:
    """One port for all: alice's flow lives, so bob gets none; then it is forgotten."""
    world.configure(flags=ConfigFlags.MASQUERADE, nat_first=61000, nat_last=61000)
    with world.remote.udp(53) as server, alice.ns.udp() as one, bob.ns.udp() as other:
        one.sendto(b"q", (str(REMOTE), 53))
        assert server.recvfrom(64)[1] == (str(NODE), 61000)
        other.sendto(b"q", (str(REMOTE), 53))
        with pytest.raises(TimeoutError):
            server.recvfrom(64)
        assert world.drops() == [(167, EGRESS, 0)]
        one.sendto(b"again", (str(REMOTE), 53))
        assert server.recvfrom(64) == (b"again", (str(NODE), 61000))
        forgotten = [key for key, _ in world.tables.ct.items()]
        world.tables.ct.delete_many(forgotten)
        other.sendto(b"q", (str(REMOTE), 53))
        data, sender = server.recvfrom(64)
        server.sendto(data, sender)
        assert other.recv(64) == b"q"


def test_a_row_that_was_evicted_is_made_again(world: KernelNode, alice: Workload) -> None:
    with world.remote.udp(53) as server, alice.ns.udp() as client:
        client.sendto(b"q", (str(REMOTE), 53))
        _, sender = server.recvfrom(64)
        for direction in NatDirection:
            rows = [key for key, _ in world.tables.nat.items() if key.direction is direction]
            world.tables.nat.delete_many(rows)
            client.sendto(b"q", (str(REMOTE), 53))
            data, sender = server.recvfrom(64)
            server.sendto(data, sender)
            assert client.recv(64) == b"q"


def test_what_cannot_be_masqueraded_does_not_leave_under_its_own_address(
    world: KernelNode, alice: Workload
) -> None:
    with alice.ns.socket(socket.SOCK_RAW, 47) as sender:
        sender.sendto(bytes(8), (str(REMOTE), 0))
    assert world.drops() == [(168, EGRESS, 0)]


def test_a_stranger_gets_nothing_through_the_pool(
    world: KernelNode, alice: Workload, bob: Workload
) -> None:
    with world.remote.udp(53) as server, world.remote.udp(54) as stranger, alice.ns.udp() as one:
        one.sendto(b"q", (str(REMOTE), 53))
        _, sender = server.recvfrom(64)
        stranger.sendto(b"x", sender)
        with pytest.raises(TimeoutError):
            one.recv(64)


def transport(proto: int) -> bytes:
    if proto == TCP:
        return tcp_segment(4000, 80) + b"odd"
    return udp_datagram(4000, 53, b"odd") if proto == UDP else icmp_echo(4000) + b"odd"


@pytest.mark.parametrize("proto", [TCP, UDP, ICMP])
def test_checksums_are_right_on_the_way_out_and_back(
    world: KernelNode, alice: Workload, proto: int
) -> None:
    """Real stacks leave them to devices that do not look: here is nobody else to do it."""
    index = world.uplink()
    packet = ipv4_packet(alice, alice, proto, transport(proto))
    packet = with_sums(packet[:30] + REMOTE.packed + packet[34:])
    assert sums_up(packet)
    assert world.run(alice, packet).result == PASSED
    out = world.run_at(index, packet, program="to_netdev", mark=0x100)
    assert out.result == PASSED
    assert (out.packet[26:30], sums_up(out.packet)) == (NODE.packed, True)
    assert out.packet != packet
    body = out.packet[34:]
    answer = b"\x00" + body[1:] if proto == ICMP else body[2:4] + body[:2] + body[4:]
    back = with_sums(out.packet[:26] + REMOTE.packed + NODE.packed + answer)
    done = world.run_at(index, back, program="from_netdev")
    assert (done.packet[30:34], sums_up(done.packet)) == (alice.address.packed, True)
    port = done.packet[38:40] if proto == ICMP else done.packet[36:38]
    assert port == (4000).to_bytes(2, "big")


def test_an_error_is_translated_with_what_it_quotes(world: KernelNode, alice: Workload) -> None:
    index = world.uplink()
    packet = ipv4_packet(alice, alice, UDP, transport(UDP))
    packet = with_sums(packet[:30] + REMOTE.packed + packet[34:])
    world.run(alice, packet)
    out = world.run_at(index, packet, program="to_netdev", mark=0x100).packet
    error = b"\3\3\0\0\0\0\0\0" + out[14:42]
    error = error[:2] + checksum(error).to_bytes(2, "big") + error[4:]
    back = ipv4_packet(alice, alice, ICMP, error)
    back = back[:26] + REMOTE.packed + NODE.packed + back[34:]
    head = back[14:24] + b"\0\0" + back[26:34]
    back = back[:24] + checksum(head).to_bytes(2, "big") + back[26:]
    done = world.run_at(index, back, program="from_netdev").packet
    assert sums_up(done)
    assert done[30:34] == alice.address.packed
    quoted = done[42:]
    assert quoted[12:16] == alice.address.packed
    assert quoted[20:22] == (4000).to_bytes(2, "big")
    assert not checksum(quoted[:20])
