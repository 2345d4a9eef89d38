"""Policy changes, and what it had before is swept, while packets are being judged."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from datapath.maps.layout import PeerFlags, PolicyPeerKey, PolicyPortKey, Verdict
from tests.fakes.kernel_node import (
    REMOTE,
    REMOTE_IDENTITY,
    KernelNode,
    Workload,
    answer,
    changed_build,
    peer,
)
from tests.fakes.packets import ipv4_packet

pytestmark = pytest.mark.kernel

EGRESS, ICMP = 2, 1
CHANGES = 1000
SLOTS = 100
ROUNDS = 50

SLOWLY = "	for (int i = 0; i < 300; i++)\n		bpf_ktime_get_ns();\n"  # some 15 us
LOOKS = "#define LOOKS 8"
ONE_LOOK = "#define LOOKS 1"

Change = Callable[[KernelNode, Workload, int], None]


@contextmanager
def slow_node(folder: Path, before: str, looks: str) -> Iterator[KernelNode]:
    """Programs that dawdle before one line of policy.h, where a packet spends a tenth of a
    microsecond otherwise."""
    changes = {"policy.h": (before, SLOWLY + before), "judge.h": (LOOKS, looks)}
    node = KernelNode.start("slots", object_path=changed_build(folder, changes))
    try:
        alice = node.add("10.81.0.11", 1001)
        node.place(alice, slot_out=1)
        yield node
    finally:
        node.stop()


def lost(node: KernelNode) -> int:
    return sum(node.counted(EGRESS, reason) for reason in (133, 165, 181, 203))


def judged_during(node: KernelNode, change: Change) -> int:
    """How many packets, allowed before and after every change, were judged, each one anew."""
    (alice,) = node.workloads
    # An echo reply nobody asked for is not tracked: it is judged however often it comes.
    packet = ipv4_packet(alice, alice, ICMP, b"\0\0\0\0\0\5\0\1")
    packet = packet[:30] + REMOTE.packed + packet[34:]
    change(node, alice, 0)
    over = threading.Event()

    def flood() -> None:
        while not over.is_set():
            node.run(alice, packet, repeat=100)

    flooding = threading.Thread(target=flood)
    flooding.start()
    try:
        for number in range(1, CHANGES):
            change(node, alice, number)
    finally:
        over.set()
        flooding.join()
    return node.counted(EGRESS) + lost(node)


def another_slot(node: KernelNode, alice: Workload, number: int) -> None:
    """Sweeps each slot as soon as the endpoint's row names the next."""
    slot, before = 1 + number % SLOTS, 1 + (number - 1) % SLOTS
    node.policy(slot, {REMOTE_IDENTITY: peer(Verdict.ALLOW, 31)})
    index = alice.link.ifindex
    row = node.tables.endpoints.get(index)
    assert row is not None
    node.tables.endpoints.put_many({index: dataclasses.replace(row, slot_out=slot)})
    swept = [PolicyPeerKey(before, REMOTE_IDENTITY), PolicyPeerKey(before, 0)]
    node.tables.policy_peer.delete_many(swept)


def another_class(node: KernelNode, alice: Workload, number: int) -> None:
    """Changes a row in place and takes its old port rows away as soon as the revision says so."""
    allowed = peer(Verdict.NONE, class_id=100 + number, flags=PeerFlags.HAS_PORTS)
    ports = {PolicyPortKey(100 + number, 0, ICMP): answer(Verdict.ALLOW, 31)}
    node.policy(1, {REMOTE_IDENTITY: allowed}, ports)
    node.tables.policy_port.delete_many([PolicyPortKey(99 + number, 0, ICMP)])


READS_ROWS = "	look_up(answer, identity, pkt);\n"
READS_PORTS = "	row = port_row(peer, pkt);\n"
RACES = pytest.mark.parametrize(
    ("before", "change"),
    [
        pytest.param(READS_ROWS, another_slot, id="another slot"),
        pytest.param(READS_PORTS, another_class, id="another class"),
    ],
)


@RACES
def test_no_packet_is_lost_to_rows_swept_at_once(
    tmp_path: Path, before: str, change: Change
) -> None:
    with slow_node(tmp_path, before, LOOKS) as node:
        not_ready = lost(node)  # what alice's stack said of itself before it had a row
        assert judged_during(node, change)
        assert lost(node) == not_ready


@RACES
def test_without_a_second_look_some_are(tmp_path: Path, before: str, change: Change) -> None:
    """That the test above meets the race at all; how soon is the scheduler's to say."""
    with slow_node(tmp_path, before, ONE_LOOK) as node:
        not_ready = lost(node)
        assert any(judged_during(node, change) and lost(node) > not_ready for _ in range(ROUNDS))


def test_connections_survive_policies_that_change_under_them(
    node: KernelNode, alice: Workload, bob: Workload
) -> None:
    node.policy(7, {alice.identity: peer(Verdict.ALLOW, 31)})
    with bob.ns.listen(80) as listener:
        for number in range(100):
            slot = 7 + number % 2
            node.policy(slot, {alice.identity: peer(Verdict.ALLOW, 31)})
            node.place(bob, slot_in=slot)
            swept = [PolicyPeerKey(15 - slot, alice.identity), PolicyPeerKey(15 - slot, 0)]
            node.tables.policy_peer.delete_many(swept)
            alice.ns.connect(bob.ip, 80).close()
            listener.accept()[0].close()
    assert node.drops() == []
