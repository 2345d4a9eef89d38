"""Connections that pass are told by their turning points, never packet by packet."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest

from datapath.maps.layout import ConfigFlags, Event, EventFlags, EventType, TracePoint
from tests.fakes.kernel_node import NODE, REMOTE, KernelNode, Workload
from tests.fakes.overlay import FAR, known, open_tunnel

pytestmark = pytest.mark.kernel

INGRESS, EGRESS = 1, 2
SYN, ACK, FIN, RST = 0x02, 0x10, 0x01, 0x04


@pytest.fixture
def traced(node: KernelNode) -> KernelNode:
    node.configure(flags=ConfigFlags.TRACE)
    return node


def turning_points(node: KernelNode) -> list[tuple[TracePoint, bool, int]]:
    """(where to, a reply, TCP flags without PSH)."""
    return [
        (TracePoint(e.point), bool(e.flags & EventFlags.REPLY), e.tcp_flags & ~8)
        for e in node.events(EventType.TRACE)
    ]


def test_a_connection_is_told_by_its_first_packets_and_its_end(
    traced: KernelNode, alice: Workload, bob: Workload
) -> None:
    with bob.ns.listen(80) as listener:
        near = alice.ns.connect(bob.ip, 80)
        far, _ = listener.accept()
        for _ in range(50):
            near.sendall(b"x" * 1000)
            assert far.recv(1000)
            far.sendall(b"y")
            assert near.recv(8)
        near.close()
        assert far.recv(8) == b""
        far.close()
    to = TracePoint.TO_ENDPOINT
    assert turning_points(traced) == [
        (to, False, SYN),
        (to, True, SYN | ACK),
        (to, False, FIN | ACK),
        (to, True, FIN | ACK),
    ]


def test_the_scene_of_a_record_is_the_judges(
    traced: KernelNode, alice: Workload, bob: Workload
) -> None:
    with bob.ns.udp(53) as server, alice.ns.udp() as client:
        client.sendto(b"q", (bob.ip, 53))
        _, asker = server.recvfrom(8)
        server.sendto(b"a", asker)
        assert client.recv(8) == b"a"
    there, back = traced.events(EventType.TRACE)

    def scene(event: Event) -> tuple[int, int, int, int, bool]:
        reply = bool(event.flags & EventFlags.REPLY)
        return event.endpoint, event.src_identity, event.dst_identity, event.direction, reply

    assert scene(there) == (bob.id, 1001, 1002, INGRESS, False)
    assert scene(back) == (alice.id, 1002, 1001, INGRESS, True)


def test_the_point_says_where_a_packet_goes(
    traced: KernelNode, alice: Workload, bob: Workload
) -> None:
    traced.uplink()
    with alice.ns.udp() as client, traced.remote.udp() as outside, traced.ns.udp() as host:
        client.sendto(b"q", (str(REMOTE), 53))
        client.sendto(b"q", (str(NODE), 53))
        outside.sendto(b"q", (bob.ip, 53))
        host.sendto(b"q", (bob.ip, 54))
    points = [(point, reply) for point, reply, _ in turning_points(traced)]
    assert points[:2] == [(TracePoint.TO_STACK, False), (TracePoint.TO_HOST, False)]
    assert points[2:].count((TracePoint.TO_ENDPOINT, False)) == 2
    overlay = open_tunnel(traced)
    traced.configure(flags=ConfigFlags.TRACE, overlay_ifindex=overlay)
    known(traced, int(IPv4Address(FAR)), 2001)
    with alice.ns.udp() as client:
        client.sendto(b"q", (FAR, 53))
    assert [point for point, _, _ in turning_points(traced)] == [TracePoint.TO_OVERLAY]


def test_nothing_is_told_of_what_passes_unless_it_is_asked_for(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    with bob.ns.listen(80):
        assert alice.ns.can_connect(bob.ip, 80)
    assert node.events(EventType.TRACE) == []
