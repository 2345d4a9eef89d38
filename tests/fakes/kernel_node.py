"""A node in a network namespace: real programs, driven by writing tables, no agent.

workload namespaces ── veth + programs ── node namespace ── plain veth ── remote namespace
                                          10.77.0.1                       10.77.0.2
                                          fd00:77::1                      fd00:77::2
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from pathlib import Path
from typing import Self, TypeVar

import pytest

from datapath import bpfcall, links
from datapath.loader import AttachMode, Datapath, Role
from datapath.maps.layout import (
    HOST_IFINDEX,
    ConfigFlags,
    Endpoint,
    EndpointFlags,
    Event,
    EventType,
    IpcacheEntry,
    LocalEndpoint,
    NodeConfig,
    PeerFlags,
    PolicyAnswer,
    PolicyPeer,
    PolicyPeerKey,
    PolicyPortKey,
    PolicyRangeKey,
    PolicySlot,
    Prefix4,
    Prefix6,
    Verdict,
)
from datapath.maps.tables import Sizes
from services.runtime.errors import Unusable
from tests.fakes.netns import Namespace

T = TypeVar("T")

BPF = Path(__file__).parents[2] / "datapath" / "bpf"
NODE = IPv4Address("10.77.0.1")
REMOTE = IPv4Address("10.77.0.2")
NODE6 = IPv6Address("fd00:77::1")
REMOTE6 = IPv6Address("fd00:77::2")
GATEWAY6 = IPv6Address("fe80::1")
HOST_IDENTITY = 1
REMOTE_IDENTITY = 16777217
NO_FLAGS = EndpointFlags(0)
ENDPOINTS: tuple[Role, ...] = ("endpoint",)
EVERY_ROLE: tuple[Role, ...] = ("endpoint", "netdev", "overlay")
NAT_PORTS = (61000, 61999)
SMALL = Sizes(
    endpoints_max=64,
    ipcache4_max=4096,
    ipcache4_prefix_max=1024,
    policy_slots_max=256,
    policy_peer_max=65536,
    policy_port_max=4096,
    policy_range_max=1024,
    ipcache6_max=4096,
    ipcache6_prefix_max=1024,
    ct_max=4096,
    nat_max=4096,
    events_bytes=262144,
)


def built_object() -> Path:
    """The object, built now if the sources are newer; skips where it cannot be had."""
    path = BPF / "tessera.o"
    sources = [*BPF.glob("*.c"), *BPF.glob("*.h"), BPF / "build.sh"]
    if not path.exists() or path.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        done = subprocess.run([str(BPF / "build.sh")], capture_output=True, text=True)
        if done.returncode and "no clang" in done.stderr:
            pytest.skip(done.stderr.strip())
        assert done.returncode == 0, done.stderr
    return path


def changed_build(folder: Path, changes: dict[str, tuple[str, str]]) -> Path:
    """The programs built in `folder`, in each file named one text changed; skips without clang."""
    for source in [*BPF.glob("*.h"), *BPF.glob("*.c"), BPF / "build.sh"]:
        text = source.read_text()
        if source.name in changes:
            old, new = changes[source.name]
            assert text.count(old) == 1, f"{source.name} has {old!r} {text.count(old)} times"
            text = text.replace(old, new)
        (folder / source.name).write_text(text)
    done = subprocess.run(["sh", str(folder / "build.sh")], capture_output=True, text=True)
    if done.returncode and "no clang" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return folder / "tessera.o"


def needs_kernel() -> None:
    """Skips, with the reason, where programs cannot be loaded or namespaces not made."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    if not shutil.which("ip"):
        pytest.skip("needs the ip command (iproute2)")
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("needs network namespaces")


@dataclass(frozen=True, slots=True)
class Workload:
    ns: Namespace
    outer: str
    link: links.VethInfo
    address: IPv4Address
    identity: int
    id: int

    @property
    def ip(self) -> str:
        return str(self.address)

    @property
    def address6(self) -> IPv6Address:
        return IPv6Address((0xFD000078 << 96) + (int(self.address) & 0xFF))

    @property
    def ip6(self) -> str:
        return str(self.address6)


NO_ROW_FLAGS = PeerFlags(0)


def answer(verdict: Verdict, rule_id: int = 0, *, flags: PeerFlags = NO_ROW_FLAGS) -> PolicyAnswer:
    return PolicyAnswer(rule_id, 0, verdict, flags)


def peer(
    verdict: Verdict,
    rule_id: int = 0,
    *,
    class_id: int = 0,
    flags: PeerFlags = NO_ROW_FLAGS,
    staged: Verdict = Verdict.NONE,
    staged_rule_id: int = 0,
) -> PolicyPeer:
    return PolicyPeer(class_id, rule_id, 0, verdict, flags, staged_rule_id, staged)


class KernelNode:
    def __init__(
        self,
        node: Namespace,
        remote: Namespace,
        datapath: Datapath,
        bpf_dir: Path,
        mode: AttachMode,
    ) -> None:
        self.ns = node
        self.remote = remote
        self.datapath = datapath
        self.bpf_dir = bpf_dir
        self.mode = mode
        self.tables = datapath.tables
        self.workloads: list[Workload] = []
        self._revision = 100

    @classmethod
    def start(
        cls,
        tag: str,
        attach: AttachMode = "auto",
        *,
        object_path: Path | None = None,
        sizes: Sizes = SMALL,
        roles: tuple[Role, ...] = ENDPOINTS,
    ) -> Self:
        """`tag`: makes the bpffs folder of this node its own."""
        needs_kernel()
        bpf_dir = Path(f"/sys/fs/bpf/tsr-test-{os.getpid()}-{tag}")
        try:
            datapath = Datapath.open(
                object_path or built_object(), bpf_dir, sizes, attach=attach, roles=roles
            )
        except Unusable as error:
            if "refuses" in str(error):
                raise
            pytest.skip(str(error))
        node, remote = Namespace.create(), Namespace.create()
        subprocess.run(
            f"ip -n {node.name} link add up0 type veth peer name eth0 netns {remote.name}".split(),
            check=True,
        )
        node.ip(f"addr add {NODE}/24 dev up0")
        node.ip("link set up0 up")
        remote.ip(f"addr add {REMOTE}/24 dev eth0")
        remote.ip("link set eth0 up")
        remote.ip(f"route add default via {NODE}")
        for ns, address in ((node, NODE6), (remote, REMOTE6)):
            device = "up0" if ns is node else "eth0"
            ns.ip(f"-6 addr add {address}/64 dev {device} nodad")
        remote.ip(f"-6 route add default via {NODE6}")
        node.call(links.ensure_forwarding)
        node.sysctl("ipv6/conf/all/forwarding", "1")
        made = cls(node, remote, datapath, bpf_dir, attach)
        made.reset()
        return made

    def stop(self) -> None:
        for workload in self.workloads:
            workload.ns.delete()
        self.call(self.datapath.cleanup)
        self.datapath.close()
        self.ns.delete()
        self.remote.delete()

    def call(self, work: Callable[[], T]) -> T:
        return self.ns.call(work)

    def add(self, address: str, identity: int) -> Workload:
        ns = Namespace.create()
        number = len(self.workloads) + 1
        outer = f"tsr{number}"
        ip = IPv4Address(address)
        link = self.call(lambda: links.create_veth(ns.name, "eth0", outer, ip))
        self.call(lambda: self.datapath.attach(link.ifindex, outer))
        self.call(lambda: links.set_up(outer, ip, link.mac))
        workload = Workload(ns, outer, link, ip, identity, number)
        self._give_ipv6(workload)
        self.workloads.append(workload)
        self.reset()
        return workload

    def _give_ipv6(self, w: Workload) -> None:
        """Permanent neighbours at both ends, as links.py makes them for IPv4."""
        w.ns.ip(f"-6 addr add {w.ip6}/128 dev eth0 nodad")
        w.ns.ip(f"-6 neigh replace {GATEWAY6} lladdr {w.link.host_mac.hex(':')} dev eth0")
        w.ns.ip(f"-6 route add default via {GATEWAY6} dev eth0")
        self.ns.sysctl(f"ipv6/conf/{w.outer}/disable_ipv6", "0")
        self.ns.ip(f"-6 neigh replace {w.ip6} lladdr {w.link.mac.hex(':')} dev {w.outer}")
        self.ns.ip(f"-6 route replace {w.ip6}/128 dev {w.outer}")

    def reset(self) -> None:
        """No policy, no flow, no event; every workload ready and open."""
        t = self.tables
        for table in (t.ct, t.policy_peer, t.policy_port, t.policy_range, t.control, t.nat):
            table.delete_many([key for key, _ in table.items()])
        for table in (t.ipcache4, t.ipcache4_prefix, t.ipcache6, t.ipcache6_prefix):
            table.delete_many([key for key, _ in table.items()])
        t.ipcache4.put_many({int(NODE): IpcacheEntry(HOST_IDENTITY)})
        t.ipcache4_prefix.put_many({Prefix4(32, int(REMOTE)): IpcacheEntry(REMOTE_IDENTITY)})
        t.ipcache6.put_many({int(NODE6): IpcacheEntry(HOST_IDENTITY)})
        t.ipcache6_prefix.put_many({Prefix6(128, int(REMOTE6)): IpcacheEntry(REMOTE_IDENTITY)})
        t.endpoints.delete_many([HOST_IFINDEX])
        t.nodes.delete_many([key for key, _ in t.nodes.items()])
        t.masquerade_exclude4.delete_many([key for key, _ in t.masquerade_exclude4.items()])
        self.call(lambda: self.datapath.detach("up0"))
        self.configure()
        for workload in self.workloads:
            self.place(workload)
        self.datapath.ring.drain(1 << 20)

    def place(
        self,
        w: Workload,
        *,
        slot_in: int = 0,
        slot_out: int = 0,
        ready: bool = True,
        identity: int | None = None,
        flags: EndpointFlags = NO_FLAGS,
    ) -> None:
        who = w.identity if identity is None else identity
        row = Endpoint(
            w.id,
            who,
            slot_in,
            slot_out,
            flags | EndpointFlags.READY if ready else flags,
            int(w.address),
            w.link.mac,
            w.link.host_mac,
            int(w.address6),
        )
        t, here = self.tables, LocalEndpoint(w.link.ifindex)
        t.endpoints.put_many({w.link.ifindex: row})
        t.local4.put_many({int(w.address): here})
        t.local6.put_many({int(w.address6): here})
        t.ipcache4.put_many({int(w.address): IpcacheEntry(who)})
        t.ipcache6.put_many({int(w.address6): IpcacheEntry(who)})

    def policy(
        self,
        slot: int,
        peers: dict[int, PolicyPeer],
        ports: dict[PolicyPortKey, PolicyAnswer] | None = None,
        ranges: dict[PolicyRangeKey, PolicyAnswer] | None = None,
    ) -> None:
        """Rows first, then a revision never used before. Identity 0 defaults to no answer."""
        rows = {0: peer(Verdict.NONE)} | peers
        self.tables.policy_port.put_many(ports or {})
        self.tables.policy_range.put_many(ranges or {})
        self.tables.policy_peer.put_many(
            {PolicyPeerKey(slot, identity): row for identity, row in rows.items()}
        )
        self._revision += 1
        self.tables.policy_slot.put_many({slot: PolicySlot(self._revision)})

    def events(self, kind: EventType | None = None) -> list[Event]:
        found = self.datapath.ring.drain(1 << 20)
        return [event for event in found if kind is None or event.type == kind]

    def drops(self) -> list[tuple[int, int, int]]:
        """(reason, direction, rule id) of what was dropped since last asked."""
        return [
            (event.reason, event.direction, event.rule_id) for event in self.events(EventType.DROP)
        ]

    def reopen(
        self, object_path: Path | None = None, roles: tuple[Role, ...] = ENDPOINTS
    ) -> Datapath:
        """What the next agent does; the one before is not closed."""
        path = object_path or built_object()
        self.datapath = Datapath.open(path, self.bpf_dir, SMALL, attach=self.mode, roles=roles)
        self.tables = self.datapath.tables
        return self.datapath

    def place_host(
        self, *, slot_in: int = 0, slot_out: int = 0, flags: EndpointFlags = NO_FLAGS
    ) -> None:
        """The host firewall, from here on."""
        flags |= EndpointFlags.READY
        row = Endpoint(99, HOST_IDENTITY, slot_in, slot_out, flags, 0, bytes(6), bytes(6))
        self.tables.endpoints.put_many({HOST_IFINDEX: row})

    def configure(self, **settings: int) -> None:
        """Fields of NodeConfig."""
        flags = ConfigFlags(settings.pop("flags", 0))
        row = NodeConfig(flags, int(NODE), nat_first=NAT_PORTS[0], nat_last=NAT_PORTS[1])
        self.tables.config.put_many({0: dataclasses.replace(row, **settings)})

    def uplink(self) -> int:
        """The device to the network, judged from here on; its ifindex."""
        index = self.call(lambda: links.ifindex_of("up0"))
        self.call(lambda: self.datapath.attach(index, "up0", "netdev"))
        return index

    def inject(self, w: Workload, packet: bytes, *, program: str = "from_endpoint") -> int:
        """Runs a program on a made-up packet as if at the workload's interface; its TC_ACT_*."""
        return self.run(w, packet, program=program).result

    def run(
        self,
        w: Workload,
        packet: bytes,
        *,
        program: str = "from_endpoint",
        mark: int = 0,
        repeat: int = 1,
    ) -> bpfcall.RunResult:
        return self.run_at(w.link.ifindex, packet, program=program, mark=mark, repeat=repeat)

    def run_at(
        self, ifindex: int, packet: bytes, *, program: str, mark: int = 0, repeat: int = 1
    ) -> bpfcall.RunResult:
        # struct __sk_buff: mark is the third word, ifindex the eleventh.
        context = bytes(8) + mark.to_bytes(4, "little") + bytes(28)
        context += ifindex.to_bytes(4, "little")
        fd = self.datapath.programs[program]
        return self.call(lambda: bpfcall.run_program(fd, packet, context=context, repeat=repeat))

    def counted(self, direction: int, reason: int = 0) -> int:
        """Packets, since the maps are there; reason 0: forwarded."""
        metric = self.tables.metrics.get(reason * 2 + direction - 1)
        return metric.packets if metric else 0
