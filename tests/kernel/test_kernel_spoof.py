"""Sources that are not what they say, and the host's address translation, which may look so."""

from __future__ import annotations

import shutil
import socket
import subprocess

import pytest

from datapath.maps.flows import CtFlags
from datapath.maps.layout import Verdict
from tests.fakes.kernel_node import REMOTE, KernelNode, Workload, peer
from tests.fakes.netns import Namespace
from tests.fakes.packets import DROPPED, PASSED, UDP, ipv4_packet, tcp_packet, udp_packet

pytestmark = pytest.mark.kernel

INGRESS = 1
FIELD, FROM_ENDPOINT = 0xF00, 0x100
VIP = "10.96.0.10"

# The host sends what goes to VIP on to bob; %s is bob's address.
RULES = """
table ip nat {
  chain prerouting {
    type nat hook prerouting priority dstnat;
    ip daddr 10.96.0.10 tcp dport 80 dnat to %s:8080
    ip daddr 10.96.0.10 udp dport 53 dnat to %s:5353
  }
}
"""


def forge(sender: Namespace, packet: bytes, to: str) -> None:
    """Sends an IP packet as it is."""
    with sender.socket(socket.SOCK_RAW, socket.IPPROTO_RAW) as raw:
        raw.sendto(packet, (to, 0))


def test_a_local_endpoints_address_from_the_network_is_dropped(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    for device in ("all", "up0"):
        path = f"/proc/sys/net/ipv4/conf/{device}/rp_filter"
        node.ns.run("import sys; open(sys.argv[1], 'w').write('0')", path)
    node.policy(7, {alice.identity: peer(Verdict.ALLOW, 31)})
    node.place(bob, slot_in=7)
    with bob.ns.udp(5000) as receiver:
        forge(node.remote, udp_packet(alice, bob, 4000, 5000)[14:], bob.ip)
        with pytest.raises(TimeoutError):
            receiver.recv(64)
        assert node.drops() == [(132, INGRESS, 0)]
        with alice.ns.udp() as sender:
            sender.sendto(b"x", (bob.ip, 5000))
            assert receiver.recv(64) == b"x"
    assert node.counted(INGRESS, 132)


def test_the_host_cannot_lend_an_endpoint_its_address_either(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    forge(node.ns, udp_packet(alice, bob, 4000, 5000)[14:], bob.ip)
    assert node.drops() == [(132, INGRESS, 0)]


@pytest.mark.parametrize("mark", [0, 0xFFFFF0FF, 0x200, 0xF00])
def test_only_the_programs_own_mark_vouches_for_a_local_source(
    node: KernelNode, alice: Workload, bob: Workload, mark: int
) -> None:
    packet = udp_packet(alice, bob, 4000, 5000)
    assert node.run(bob, packet, program="to_endpoint", mark=mark).result == DROPPED
    vouched = mark & ~FIELD | FROM_ENDPOINT
    done = node.run(bob, packet, program="to_endpoint", mark=vouched)
    assert (done.result, done.mark) == (PASSED, vouched)


@pytest.mark.parametrize("mark", [0, 0x100, 0xF00, 0xFFFFFFFF, 0xABCDE012])
def test_the_mark_is_written_over_and_other_bits_survive(
    node: KernelNode, alice: Workload, bob: Workload, mark: int
) -> None:
    outside = ipv4_packet(alice, bob, UDP, udp_packet(alice, bob, 1, 2)[34:])
    outside = outside[:30] + REMOTE.packed + outside[34:]
    done = node.run(alice, outside, mark=mark)
    assert (done.result, done.mark) == (PASSED, mark & ~FIELD | FROM_ENDPOINT)


@pytest.fixture
def translated(node: KernelNode, bob: Workload) -> KernelNode:
    if not shutil.which("nft"):
        pytest.skip("needs nft (nftables)")
    words = ["nsenter", f"--net={node.ns.path}", "nft", "-f", "-"]
    rules = "flush ruleset" + RULES % (bob.ip, bob.ip)
    done = subprocess.run(words, input=rules, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs NAT in the kernel: {done.stderr.strip()}")
    return node


def test_a_connection_the_host_translates_is_judged_by_its_real_ends(
    translated: KernelNode, alice: Workload, bob: Workload
) -> None:
    node = translated
    node.policy(7, {alice.identity: peer(Verdict.ALLOW, 31)})
    node.policy(8, {})
    node.place(bob, slot_in=7, slot_out=8)
    node.place(alice, slot_in=8)
    with bob.ns.listen(8080) as listener, alice.ns.connect(VIP, 80) as near:
        far, peer_name = listener.accept()
        far.settimeout(1)
        assert peer_name[0] == alice.ip
        near.sendall(b"ask")
        assert far.recv(8) == b"ask"
        far.sendall(b"answer")
        assert near.recv(8) == b"answer"
        far.close()
    assert node.drops() == []
    flags = [entry.flags for key, entry in node.tables.ct.items() if 8080 in key.port]
    assert [flag & CtFlags.VIA_STACK for flag in flags] == [CtFlags.VIA_STACK]
    node.policy(7, {alice.identity: peer(Verdict.DENY, 32)})
    with bob.ns.listen(8080):
        assert not alice.ns.can_connect(VIP, 80)
    assert set(node.drops()) == {(181, INGRESS, 32)}


def test_an_icmp_error_goes_back_through_the_translation(
    translated: KernelNode, alice: Workload, bob: Workload
) -> None:
    translated.policy(8, {})
    translated.place(bob, slot_out=8)
    translated.place(alice, slot_in=8)
    with alice.ns.udp() as client:
        client.connect((VIP, 53))
        client.send(b"nobody listens")
        with pytest.raises(ConnectionRefusedError):
            client.recv(8)
    assert translated.drops() == []


def test_between_endpoints_without_translation_the_stack_is_not_asked(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.inject(alice, tcp_packet(alice, bob, 1, 2))
    ((_, entry),) = node.tables.ct.items()
    assert not entry.flags & CtFlags.VIA_STACK
