"""Restarts and upgrades of the agent as the kernel sees them."""

from __future__ import annotations

import dataclasses
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from datapath.libbpf import verifier_summary
from datapath.loader import Datapath
from datapath.maps.layout import IpcacheEntry, PolicyPeerKey, Verdict
from datapath.maps.tables import Tables
from services.runtime.errors import Exhausted, NotFound, Unusable
from tests.fakes.kernel_node import (
    EVERY_ROLE,
    SMALL,
    KernelNode,
    Workload,
    built_object,
    changed_build,
    needs_kernel,
    peer,
)

pytestmark = pytest.mark.kernel


@pytest.fixture(params=["tcx", "clsact", "auto", "auto, settled"])
def own_node(request: pytest.FixtureRequest) -> Iterator[KernelNode]:
    mode, _, settled = request.param.partition(", ")
    node = KernelNode.start(f"own-{mode}", mode)
    try:
        for address, identity in (("10.79.0.11", 1001), ("10.79.0.12", 1002)):
            made = node.add(address, identity)
            if settled:
                settle(node, made)
        yield node
    finally:
        node.stop()


def settle(node: KernelNode, made: Workload) -> None:
    if not node.call(lambda: node.datapath.settle(made.link.ifindex, made.outer)):
        pytest.skip("needs tcx (kernel 6.6)")


@pytest.fixture
def bpf_dir() -> Iterator[Path]:
    needs_kernel()
    path = Path(f"/sys/fs/bpf/tsr-test-{os.getpid()}-loader")
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


def other_build(folder: Path) -> Path:
    """The same programs with one constant changed."""
    return changed_build(folder, {"conntrack.h": ("TCP_CLOSING_S 10", "TCP_CLOSING_S 11")})


def test_the_next_agent_finds_maps_attachments_and_live_connections(
    own_node: KernelNode,
) -> None:
    alice, bob = own_node.workloads
    own_node.policy(7, {1001: peer(Verdict.ALLOW, 31)})
    own_node.place(bob, slot_in=7)
    with bob.ns.listen(80) as listener, alice.ns.connect(bob.ip, 80) as near:
        far, _ = listener.accept()
        far.settimeout(1)
        own_node.datapath.close()
        near.sendall(b"nobody is at home")
        assert far.recv(64) == b"nobody is at home"
        again = own_node.reopen()
        assert own_node.call(again.attached) == {alice.outer, bob.outer}
        assert own_node.call(again.replace_programs) == 0
        assert again.tables.policy_peer.get(PolicyPeerKey(7, 1001)) == peer(Verdict.ALLOW, 31)
        near.sendall(b"x")
        assert far.recv(64) == b"x"
        far.close()


def test_new_programs_take_over_under_a_live_connection(
    own_node: KernelNode, tmp_path: Path
) -> None:
    alice, bob = own_node.workloads
    new = other_build(tmp_path)
    with bob.ns.listen(80) as listener, alice.ns.connect(bob.ip, 80) as near:
        far, _ = listener.accept()
        far.settimeout(1)
        own_node.events()
        old = own_node.datapath
        own_node.reopen(new)
        assert own_node.call(own_node.datapath.replace_programs) in (2, 4)
        assert own_node.call(own_node.datapath.replace_programs) == 0
        old.close()
        near.sendall(b"x")
        assert far.recv(8) == b"x"
        far.close()
        assert own_node.events() == []
        assert alice.ns.can_connect(bob.ip, 80)


def test_detaching_lets_everything_pass_and_is_repeatable(own_node: KernelNode) -> None:
    alice, bob = own_node.workloads
    own_node.place(bob, ready=False)
    with bob.ns.listen(80):
        assert not own_node.ns.can_connect(bob.ip, 80)
        own_node.call(lambda: own_node.datapath.detach(bob.outer))
        own_node.call(lambda: own_node.datapath.detach(bob.outer))
        assert own_node.call(own_node.datapath.attached) == {alice.outer}
        assert own_node.ns.can_connect(bob.ip, 80)


def test_attaching_twice_changes_nothing(own_node: KernelNode) -> None:
    alice, _ = own_node.workloads
    own_node.call(lambda: own_node.datapath.attach(alice.link.ifindex, alice.outer))
    assert alice.outer in own_node.call(own_node.datapath.attached)


def test_an_interface_that_is_gone_is_not_attached_any_more(own_node: KernelNode) -> None:
    alice, bob = own_node.workloads
    own_node.ns.ip(f"link del {bob.outer}")
    assert own_node.call(own_node.datapath.attached) == {alice.outer}
    own_node.ns.ip(f"link add {bob.outer} type veth peer name other0")
    assert own_node.call(own_node.datapath.attached) == {alice.outer}
    index = next(
        int(line.split(":")[0])
        for line in own_node.ns.ip("-o link").splitlines()
        if f" {bob.outer}@" in line
    )
    own_node.call(lambda: own_node.datapath.attach(index, bob.outer))
    assert own_node.call(own_node.datapath.attached) == {alice.outer, bob.outer}


def test_a_device_in_a_role_the_next_agent_has_not_is_let_go(own_node: KernelNode) -> None:
    alice, bob = own_node.workloads
    own_node.reopen(roles=EVERY_ROLE)
    own_node.uplink()
    assert own_node.call(lambda: own_node.datapath.attached("netdev")) == {"up0"}
    again = own_node.reopen()
    assert own_node.call(again.replace_programs) == 2
    assert own_node.call(lambda: again.attached("netdev")) == set()
    assert own_node.call(again.attached) == {alice.outer, bob.outer}


def test_attaching_to_nothing_is_not_found(own_node: KernelNode) -> None:
    with pytest.raises(NotFound):
        own_node.call(lambda: own_node.datapath.attach(9999, "nothing"))


def test_an_empty_map_takes_the_new_size_and_a_full_one_refuses(bpf_dir: Path) -> None:
    Datapath.open(built_object(), bpf_dir, SMALL).close()
    bigger = dataclasses.replace(SMALL, policy_peer_max=70000, events_bytes=524288)
    again = Datapath.open(built_object(), bpf_dir, bigger)
    assert again.tables.policy_peer.max_entries == 70000
    again.tables.policy_peer.put_many({PolicyPeerKey(1, 0): peer(Verdict.ALLOW)})
    again.close()
    with pytest.raises(Unusable, match="policy_peer is in use with 70000 entries"):
        Datapath.open(built_object(), bpf_dir, SMALL)
    assert Tables.pinned(bpf_dir).policy_peer.count() == 1


def test_a_full_map_names_itself_and_the_key_that_raises_it(bpf_dir: Path) -> None:
    opened = Datapath.open(built_object(), bpf_dir, SMALL)
    rows = {address: IpcacheEntry(1) for address in range(SMALL.ipcache4_max + 1)}
    with pytest.raises(Exhausted, match=r"ipcache4 is full \(4096 entries\).*ipcache4_max"):
        opened.tables.ipcache4.put_many(rows)
    opened.cleanup()
    opened.close()


def test_a_missing_object_says_how_to_build_it(bpf_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="make setup"):
        Datapath.open(tmp_path / "tessera.o", bpf_dir, SMALL)


def test_a_folder_outside_bpffs_is_refused(tmp_path: Path) -> None:
    needs_kernel()
    with pytest.raises(Unusable, match="not on a BPF file system"):
        Datapath.open(built_object(), tmp_path, SMALL)


def test_a_refused_program_is_summed_up_in_one_line_with_the_log_in_a_file(
    bpf_dir: Path, tmp_path: Path
) -> None:
    other_build(tmp_path)  # skips without clang
    bad = (
        (tmp_path / "tessera.c")
        .read_text()
        .replace(
            "	__u32 ifindex = skb->ifindex;\n",
            "	__u32 ifindex = skb->ifindex;\n"
            "	if (*(volatile __u32 *)(long)skb->data)\n		return 0;\n",
        )
    )
    (tmp_path / "tessera.c").write_text(bad)
    subprocess.run(["sh", str(tmp_path / "build.sh")], check=True)
    with pytest.raises(Unusable, match="outside of the packet") as refusal:
        Datapath.open(tmp_path / "tessera.o", bpf_dir, SMALL, log_dir=tmp_path)
    (log,) = tmp_path.glob("tessera-verifier-*.log")
    assert str(log) in str(refusal.value)
    assert "outside of the packet" in log.read_text()


def test_the_summary_is_the_last_line_before_the_statistics() -> None:
    log = "0: R1=ctx()\nR1 invalid mem access 'scalar'\nprocessed 7 insns (limit 1000000)\n-- END\n"
    assert verifier_summary(log) == "R1 invalid mem access 'scalar'"


def test_cleanup_leaves_nothing_behind(bpf_dir: Path) -> None:
    opened = Datapath.open(built_object(), bpf_dir, SMALL)
    opened.cleanup()
    opened.close()
    assert not bpf_dir.exists()
    with pytest.raises(NotFound):
        Tables.pinned(bpf_dir)


def test_loading_leaks_no_descriptor(bpf_dir: Path) -> None:
    Datapath.open(built_object(), bpf_dir, SMALL).close()
    before = len(os.listdir("/proc/self/fd"))
    Datapath.open(built_object(), bpf_dir, SMALL).close()
    assert len(os.listdir("/proc/self/fd")) == before
