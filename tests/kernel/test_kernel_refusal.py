"""Who is denied is told, where policy or endpoint ask for it; and audit, which denies nothing."""

from __future__ import annotations

import socket
import struct

import pytest

from datapath.maps.layout import (
    EndpointFlags,
    EventFlags,
    EventType,
    PeerFlags,
    PolicyPortKey,
    Verdict,
)
from tests.fakes.kernel_node import REMOTE_IDENTITY, KernelNode, Workload, answer, peer
from tests.fakes.packets import (
    DROPPED,
    ICMP6,
    REDIRECTED,
    TCP,
    UDP,
    ipv4_packet,
    ipv6_packet,
    sums_up,
    tcp_packet,
    tcp_segment,
    udp_datagram,
    udp_packet,
)

pytestmark = pytest.mark.kernel

ALLOW, DENY, NONE = Verdict.ALLOW, Verdict.DENY, Verdict.NONE
INGRESS, EGRESS = 1, 2
RESPOND, AUDIT = EndpointFlags.RESPOND, EndpointFlags.AUDIT
SO_MARK = 36


def refused(client: Workload, address: str) -> bool:
    """By an answer, before the time is up."""
    try:
        client.ns.connect(address, 80, timeout_s=2.0).close()
    except ConnectionRefusedError:
        return True
    except OSError as error:
        return error.errno in (113, 13)  # EHOSTUNREACH, EACCES: what an ICMP error turns into
    return False


def told_of_datagram(client: Workload, address: str) -> bool:
    anywhere = "::" if ":" in address else "0.0.0.0"
    with client.ns.udp(0, anywhere) as sock:
        sock.connect((address, 53))
        sock.send(b"x")
        try:
            sock.recv(8)
        except TimeoutError:
            return False
        except OSError as error:
            return error.errno in (111, 113, 13)
    return False


@pytest.mark.parametrize("family", [4, 6])
def test_a_denied_client_of_the_same_node_fails_at_once(
    node: KernelNode, alice: Workload, bob: Workload, family: int
) -> None:
    address = bob.ip if family == 4 else bob.ip6
    node.policy(7, {})
    node.place(bob, slot_in=7, flags=RESPOND)
    assert refused(alice, address)
    assert told_of_datagram(alice, address)
    assert {drop[:2] for drop in node.drops()} == {(133, INGRESS)}
    node.place(bob, slot_in=7)
    assert not alice.ns.can_connect(address, 80, timeout_s=0.2)


@pytest.mark.parametrize("family", [4, 6])
def test_a_client_denied_its_own_egress_fails_at_once(
    node: KernelNode, alice: Workload, family: int
) -> None:
    address = "10.77.0.2" if family == 4 else "fd00:77::2"
    node.policy(8, {REMOTE_IDENTITY: peer(DENY, 41)})
    node.place(alice, slot_out=8, flags=RESPOND)
    assert refused(alice, address)
    assert told_of_datagram(alice, address)
    assert set(node.drops()) == {(181, EGRESS, 41)}


@pytest.mark.parametrize("family", [4, 6])
def test_a_denied_client_in_the_network_fails_at_once(
    node: KernelNode, bob: Workload, family: int
) -> None:
    address = bob.ip if family == 4 else bob.ip6
    node.policy(7, {})
    node.place(bob, slot_in=7, flags=RESPOND)
    outside = Workload(node.remote, "", bob.link, bob.address, 0, 0)
    assert refused(outside, address)
    assert told_of_datagram(outside, address)


def test_a_row_may_ask_for_the_answer_instead_of_the_endpoint(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    rows = {0: peer(NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
    told = answer(DENY, 61, flags=PeerFlags.RESPOND)
    node.policy(7, rows, {PolicyPortKey(5, 80, TCP): told})
    node.place(bob, slot_in=7)
    assert node.inject(alice, tcp_packet(alice, bob, 4000, 80)) == REDIRECTED
    assert node.inject(alice, tcp_packet(alice, bob, 4000, 81)) == DROPPED
    assert node.drops() == [(181, INGRESS, 61), (133, INGRESS, 2)]


def test_a_revoked_connection_is_reset(node: KernelNode, alice: Workload, bob: Workload) -> None:
    with bob.ns.listen(80) as listener, alice.ns.connect(bob.ip, 80) as near:
        far, _ = listener.accept()
        with far:
            node.policy(7, {})
            node.place(bob, slot_in=7, flags=RESPOND)
            near.settimeout(2)
            near.sendall(b"x" * 4000)
            with pytest.raises(ConnectionResetError):
                near.recv(8)


def test_what_could_be_answered_in_turn_gets_no_answer(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {})
    node.place(bob, slot_in=7, flags=RESPOND)
    error = b"\3\3\0\0\0\0\0\0" + udp_packet(bob, alice, 1, 2)[14:]
    silent = [
        tcp_packet(alice, bob, 4000, 80, flags=0x04),
        ipv4_packet(alice, bob, 1, error),
        ipv6_packet(alice, bob.address6, TCP, tcp_segment(1, 2, flags=0x14)),
        ipv6_packet(alice, bob.address6, ICMP6, b"\1\4\0\0\0\0\0\0" + bytes(48)),
    ]
    for packet in silent:
        assert node.inject(alice, packet) == DROPPED
    asked = ipv6_packet(alice, bob.address6, UDP, udp_datagram(1, 2))
    assert node.inject(alice, asked) == REDIRECTED


def test_no_endpoint_may_pass_its_packets_off_as_such_an_answer(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(8, {})
    node.place(alice, slot_out=8)
    with bob.ns.udp(53) as server, alice.ns.udp() as client:
        client.setsockopt(socket.SOL_SOCKET, SO_MARK, 0x200)
        client.sendto(b"x", (bob.ip, 53))
        with pytest.raises(TimeoutError):
            server.recv(8)
    assert node.drops() == [(133, EGRESS, 2)]


def test_an_audited_endpoint_denies_nothing_and_says_what_it_would(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {1001: peer(DENY, 41)})
    node.place(bob, slot_in=7, flags=AUDIT)
    with bob.ns.udp(53) as server, alice.ns.udp() as client:
        client.sendto(b"x", (bob.ip, 53))
        assert server.recv(8) == b"x"
        (judged,) = [e for e in node.events() if e.direction == INGRESS]
        assert (judged.type, judged.verdict, judged.rule_id) == (EventType.VERDICT, DENY, 41)
        assert judged.flags == EventFlags.AUDIT
        client.sendto(b"y", (bob.ip, 53))
        assert server.recv(8) == b"y"
        assert node.events() == []
        node.place(bob, slot_in=7)
        client.sendto(b"z", (bob.ip, 53))
        with pytest.raises(TimeoutError):
            server.recv(8)
    assert node.drops() == [(181, INGRESS, 41)]


def test_an_audited_row_denies_nothing_until_it_is_changed(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {0: peer(NONE, flags=PeerFlags.AUDIT)})
    node.place(bob, slot_in=7)
    packet = udp_packet(alice, bob, 4000, 53)
    assert node.inject(alice, packet) == REDIRECTED
    (judged,) = [e for e in node.events() if e.direction == INGRESS]
    assert (judged.verdict, judged.rule_id, judged.flags) == (NONE, 2, EventFlags.AUDIT)
    node.policy(7, {})
    assert node.inject(alice, packet) == DROPPED


def test_the_staged_answer_is_told_beside_the_enforced_one(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    staged = peer(ALLOW, 31, flags=PeerFlags.STAGED, staged=DENY, staged_rule_id=51)
    node.policy(7, {1001: staged})
    node.place(bob, slot_in=7)
    assert node.inject(alice, udp_packet(alice, bob, 4000, 53)) == REDIRECTED
    outgoing, judged = node.events(EventType.VERDICT)
    assert (judged.verdict, judged.rule_id) == (ALLOW, 31)
    assert (judged.flags, judged.staged, judged.staged_rule_id) == (EventFlags.STAGED, DENY, 51)
    assert (outgoing.flags, outgoing.staged_rule_id) == (0, 0)


@pytest.mark.parametrize("flags", [0x02, 0x10, 0x11, 0x18])
@pytest.mark.parametrize("family", [4, 6])
def test_a_reset_is_what_the_protocol_asks_for(
    node: KernelNode, alice: Workload, bob: Workload, family: int, flags: int
) -> None:
    """RFC 9293, 3.10.7.1."""
    node.policy(8, {})
    node.place(alice, slot_out=8, flags=RESPOND)
    sent = struct.pack("!2H2I2B3H", 4000, 80, 7000, 9000, 0x60, flags, 0, 0, 0) + bytes(4 + 10)
    if family == 4:
        packet, start = ipv4_packet(alice, bob, TCP, sent), 34
    else:
        packet, start = ipv6_packet(alice, bob.address6, TCP, sent), 54
    done = node.run(alice, packet)
    assert done.result == REDIRECTED
    out = done.packet
    assert sums_up(out)
    assert (out[:6], out[6:12]) == (alice.link.mac, alice.link.host_mac)
    assert len(out) == start + 20
    sport, dport, seq, ack, size, said = struct.unpack_from("!2H2I2B", out, start)
    assert (sport, dport, size) == (80, 4000, 0x50)
    length = 10 + bool(flags & 0x02) + bool(flags & 0x01)
    expected = (9000, 0, 0x04) if flags & 0x10 else (0, 7000 + length, 0x14)
    assert (seq, ack, said) == expected


@pytest.mark.parametrize("payload", [b"", b"x" * 900])
@pytest.mark.parametrize("family", [4, 6])
def test_an_error_quotes_the_packets_beginning(
    node: KernelNode, alice: Workload, bob: Workload, family: int, payload: bytes
) -> None:
    node.policy(8, {})
    node.place(alice, slot_out=8, flags=RESPOND)
    datagram = udp_datagram(4000, 53, payload)
    if family == 4:
        packet, start, quote = ipv4_packet(alice, bob, UDP, datagram), 34, 28
    else:
        packet, start, quote = ipv6_packet(alice, bob.address6, UDP, datagram), 54, 48
    out = node.run(alice, packet).packet
    assert sums_up(out)
    assert len(out) == start + 8 + quote
    assert out[start : start + 2] == (b"\3\x0d" if family == 4 else b"\1\1")
    assert out[start + 8 :] == packet[14 : 14 + quote]
