"""From filters to links under traffic, and crashes on the way."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest

from datapath.attachments import DIRECTIONS
from datapath.maps.layout import PeerFlags, PolicyPortKey, Verdict
from services.runtime.errors import Unusable
from tests.fakes.kernel_node import KernelNode, Workload, answer, changed_build, peer

pytestmark = pytest.mark.kernel

UDP, INGRESS = 17, 1
OPEN_PORT, CLOSED_PORT = 5000, 5001
RCVBUF_BYTES = 8 << 20
SO_RCVBUFFORCE = 33  # asm-generic/socket.h; the module does not name it


@pytest.fixture
def own_node() -> Iterator[KernelNode]:
    node = KernelNode.start("settle")
    try:
        node.add("10.82.0.11", 1001)
        bob = node.add("10.82.0.12", 1002)
        rows = {0: peer(Verdict.NONE, class_id=5, flags=PeerFlags.HAS_PORTS)}
        node.policy(7, rows, {PolicyPortKey(5, OPEN_PORT, UDP): answer(Verdict.ALLOW, 61)})
        node.place(bob, slot_in=7)
        yield node
    finally:
        node.stop()


def settle(node: KernelNode, w: Workload) -> bool:
    return node.call(lambda: node.datapath.settle(w.link.ifindex, w.outer))


def needs_tcx(node: KernelNode) -> None:
    if not all(settle(node, w) for w in node.workloads):
        pytest.skip("needs tcx (kernel 6.6)")


def filters(node: KernelNode, w: Workload) -> str:
    hooks = ("ingress", "egress")
    return "".join(tc(node, "filter", "show", "dev", w.outer, hook) for hook in hooks)


def tc(node: KernelNode, *words: str) -> str:
    words = ("tc", "-n", node.ns.name, *words)
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


class Traffic:
    """Datagrams from the node to bob, through to_endpoint, alternately to a port that is open and
    one that is not; numbered."""

    def __init__(self, node: KernelNode, bob: Workload) -> None:
        self._sender = node.ns.udp()
        self._to = bob.ip
        self._receivers = [bob.ns.udp(OPEN_PORT), bob.ns.udp(CLOSED_PORT)]
        for receiver in self._receivers:
            receiver.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, RCVBUF_BYTES)
            receiver.setblocking(False)
        self._over = threading.Event()
        self.sent = 0
        self._thread = threading.Thread(target=self._send)

    def _send(self) -> None:
        while not self._over.wait(0.0002):
            for port in (OPEN_PORT, CLOSED_PORT):
                self._sender.sendto(self.sent.to_bytes(4, "big"), (self._to, port))
            self.sent += 1

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._over.set()
        self._thread.join()

    def close(self) -> None:
        for sock in (self._sender, *self._receivers):
            sock.close()

    def lost(self) -> set[int]:
        """Of the open port; what is under way may take its time."""
        missing = set(range(self.sent))
        self._receivers[0].settimeout(1.0)
        with suppress(TimeoutError):
            while missing:
                missing.discard(int.from_bytes(self._receivers[0].recv(64), "big"))
        return missing

    def leaked(self) -> set[int]:
        """To the closed port; ask after `lost`."""
        numbers = set()
        with suppress(BlockingIOError):
            while True:
                numbers.add(int.from_bytes(self._receivers[1].recv(64), "big"))
        return numbers


@contextmanager
def traffic(node: KernelNode, bob: Workload) -> Iterator[Traffic]:
    flowing = Traffic(node, bob)
    flowing.start()
    try:
        yield flowing
    finally:
        flowing.stop()
        flowing.close()


def test_judgement_has_no_gap_from_attach_to_settle_and_on(own_node: KernelNode) -> None:
    """And settling twice is settling once; detaching loses nothing either."""
    node, bob = own_node, own_node.workloads[1]
    node.call(lambda: node.datapath.detach(bob.outer))
    assert bob.outer not in node.call(node.datapath.attached)
    with traffic(node, bob) as flowing:
        attach(node, bob)
        attached_at = flowing.sent + 1
        assert node.call(node.datapath.unsettled)[bob.outer] == bob.link.ifindex
        for _ in range(3):
            settle(node, bob)
            attach(node, bob)
        detaching_at = flowing.sent
        node.call(lambda: node.datapath.detach(bob.outer))
        flowing.stop()
        assert flowing.lost() == set()
        assert not flowing.leaked() & set(range(attached_at, detaching_at))
        assert detaching_at > attached_at


def attach(node: KernelNode, w: Workload) -> None:
    node.call(lambda: node.datapath.attach(w.link.ifindex, w.outer))


def stop_short(node: KernelNode, w: Workload, links: int) -> None:
    """As a crash leaves it: so many links are there, the filters still, the process gone."""
    needs_tcx(node)
    node.call(lambda: node.datapath.detach(w.outer))
    attach(node, w)
    put = node.datapath._attachments._link
    for direction in DIRECTIONS["endpoint"][:links]:
        node.call(partial(put, w.link.ifindex, w.outer, direction))
    node.datapath.close()
    node.reopen()


@pytest.mark.parametrize("links", [0, 1, 2])
def test_after_a_crash_between_the_steps_packets_are_judged_and_counted_once(
    own_node: KernelNode, links: int
) -> None:
    node, bob = own_node, own_node.workloads[1]
    stop_short(node, bob, links)
    before = node.counted(INGRESS), node.counted(INGRESS, 133)
    with traffic(node, bob) as flowing:
        assert node.call(node.datapath.attached) == {w.outer for w in node.workloads}
        assert node.call(node.datapath.unsettled) == {bob.outer: bob.link.ifindex}
        assert settle(node, bob)
        assert node.call(node.datapath.unsettled) == {}
        flowing.stop()
        assert flowing.lost() == set()
        assert flowing.leaked() == set()
        passed = node.counted(INGRESS) - before[0]
        dropped = node.counted(INGRESS, 133) - before[1]
        # The refusals of CLOSED_PORT never leave bob: nothing else goes in.
        assert (passed, dropped) == (flowing.sent, flowing.sent)
    assert filters(node, bob) == ""


@pytest.mark.parametrize("links", [0, 1, 2])
def test_detaching_removes_filters_and_links_alike(own_node: KernelNode, links: int) -> None:
    node, bob = own_node, own_node.workloads[1]
    stop_short(node, bob, links)
    node.call(lambda: node.datapath.detach(bob.outer))
    assert node.call(node.datapath.attached) == {node.workloads[0].outer}
    assert not settle(node, bob)
    with node.ns.udp() as sender, bob.ns.udp(CLOSED_PORT) as receiver:
        sender.sendto(b"x", (bob.ip, CLOSED_PORT))
        assert receiver.recv(8) == b"x"
    assert filters(node, bob) == ""


@pytest.mark.parametrize(("links", "attachments"), [(0, 2), (1, 3), (2, 4)])
def test_new_programs_go_wherever_the_old_ones_hang(
    own_node: KernelNode, tmp_path: Path, links: int, attachments: int
) -> None:
    node, (alice, bob) = own_node, own_node.workloads
    stop_short(node, bob, links)
    new = changed_build(tmp_path, {"conntrack.h": ("TCP_CLOSING_S 10", "TCP_CLOSING_S 11")})
    with traffic(node, bob) as flowing:
        old = node.datapath
        node.reopen(new)
        assert node.call(node.datapath.replace_programs) == 2 + attachments
        assert node.call(node.datapath.replace_programs) == 0
        old.close()
        assert settle(node, bob)
        flowing.stop()
        assert flowing.lost() == set()
        assert flowing.leaked() == set()
    assert node.call(node.datapath.attached) == {alice.outer, bob.outer}


def test_other_peoples_filters_stay(own_node: KernelNode) -> None:
    node, bob = own_node, own_node.workloads[1]
    theirs = ("filter", "add", "dev", bob.outer, "ingress", "prio", "50")
    tc(node, *theirs, "bpf", "bytecode", "1,6 0 0 0")
    needs_tcx(node)
    assert "pref 50 bpf" in filters(node, bob)
    assert "pref 1 " not in filters(node, bob)
    node.call(lambda: node.datapath.detach(bob.outer))
    assert "pref 50 bpf" in filters(node, bob)


def test_where_a_filter_cannot_be_a_link_is_put_at_once(own_node: KernelNode) -> None:
    node = own_node
    node.ns.ip("link add other type veth peer name other0")
    tc(node, "qdisc", "add", "dev", "other", "ingress")
    index = node.call(lambda: socket.if_nametoindex("other"))
    try:
        node.call(lambda: node.datapath.attach(index, "other"))
    except Unusable:
        pytest.skip("needs tcx (kernel 6.6)")
    assert "other" in node.call(node.datapath.attached)
    assert node.call(lambda: node.datapath.settle(index, "other"))


def test_what_is_gone_detached_or_another_by_now_is_not_settled(own_node: KernelNode) -> None:
    node, (alice, bob) = own_node, own_node.workloads
    assert not node.call(lambda: node.datapath.settle(bob.link.ifindex, "nothing"))
    assert not node.call(lambda: node.datapath.settle(alice.link.ifindex, bob.outer))
    node.ns.ip(f"link del {bob.outer}")
    assert not settle(node, bob)
    assert node.call(node.datapath.unsettled) == {alice.outer: alice.link.ifindex}


def test_with_clsact_alone_there_is_nothing_to_settle() -> None:
    node = KernelNode.start("filters", "clsact")
    try:
        made = node.add("10.82.0.11", 1001)
        assert not settle(node, made)
        assert node.call(node.datapath.unsettled) == {}
        assert node.call(node.datapath.attached) == {made.outer}
    finally:
        node.stop()


def test_whoever_wins_a_detached_interface_stays_detached(own_node: KernelNode) -> None:
    node, (alice, bob) = own_node, own_node.workloads
    works: list[Callable[[], object]] = [
        lambda: node.datapath.settle(bob.link.ifindex, bob.outer),
        lambda: node.datapath.detach(bob.outer),
        lambda: node.datapath.settle(alice.link.ifindex, alice.outer),
        lambda: node.datapath.settle(bob.link.ifindex, bob.outer),
    ]
    threads = [threading.Thread(target=node.call, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert node.call(node.datapath.attached) == {alice.outer}
    assert sorted(p.name for p in (node.bpf_dir / "filters").iterdir() if "2" in p.name) == []
