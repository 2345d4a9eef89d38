"""An agent that finds the first layout's maps goes on with what they say."""

from __future__ import annotations

import dataclasses
import os
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import IPv4Address
from pathlib import Path

import pytest

from datapath import bpfcall, migrate
from datapath.libbpf import BpfObject
from datapath.loader import Datapath
from datapath.maps.flows import CtFlags
from datapath.maps.layout import (
    Endpoint,
    EndpointFlags,
    IpcacheEntry,
    LocalEndpoint,
    PeerFlags,
    PolicyAnswer,
    PolicyPeer,
    PolicyPeerKey,
    PolicyPortKey,
    PolicySlot,
    Prefix4,
    Verdict,
    plain,
)
from tests.fakes.kernel_node import BPF, SMALL, KernelNode, Workload, built_object, needs_kernel
from tests.fakes.packets import udp_packet

pytestmark = pytest.mark.kernel

# The first layout's maps: name, kind, key and value bytes.
FIRST = [
    ("endpoints", "HASH", 4, 36),
    ("local4", "HASH", 4, 4),
    ("ipcache4", "HASH", 4, 8),
    ("ipcache4_prefix", "LPM_TRIE", 8, 8),
    ("policy_slot", "ARRAY", 4, 4),
    ("policy_peer", "HASH", 8, 12),
    ("policy_port", "HASH", 8, 8),
    ("policy_range", "LPM_TRIE", 12, 8),
    ("ct4", "LRU_HASH", 16, 88),
]
MAP = """
struct {{
	__uint(type, BPF_MAP_TYPE_{kind});
	__uint(map_flags, {flags});
	__uint(max_entries, 64);
	__uint(key_size, {key});
	__uint(value_size, {value});
}} {name} SEC(".maps");
"""


@pytest.fixture
def bpf_dir() -> Iterator[Path]:
    needs_kernel()
    path = Path(f"/sys/fs/bpf/tsr-test-{os.getpid()}-migrate")
    path.mkdir()
    yield path
    subprocess.run(["rm", "-rf", str(path)], check=True)


@pytest.fixture
def first_maps(bpf_dir: Path, tmp_path: Path) -> Iterator[Path]:
    """The folder of the first layout, its maps empty."""
    built_object()  # skips without clang
    source = "#include <linux/bpf.h>\n#include <bpf/bpf_helpers.h>\n"
    for name, kind, key, value in FIRST:
        flags = "BPF_F_NO_PREALLOC" if kind == "LPM_TRIE" else "0"
        source += MAP.format(name=name, kind=kind, key=key, value=value, flags=flags)
    (tmp_path / "tessera.c").write_text(source)
    (tmp_path / "build.sh").write_text((BPF / "build.sh").read_text())
    done = subprocess.run(["sh", str(tmp_path / "build.sh")], capture_output=True, text=True)
    if "no clang" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    bpf = BpfObject(tmp_path / "tessera.o")
    folder = bpf_dir / "maps"
    folder.mkdir()
    for name, spec in bpf.maps.items():
        spec.pin_at(folder / name)
    bpf.load()
    yield folder
    bpf.close()


def write(folder: Path, name: str, key: bytes, value: bytes) -> None:
    fd = bpfcall.get_pinned(folder / name)
    try:
        bpfcall.map_update(fd, key, value)
    finally:
        os.close(fd)


def ip(text: str) -> bytes:
    return IPv4Address(text).packed


def fill(folder: Path) -> None:
    macs = b"abcdefghijkl"
    write(
        folder,
        "endpoints",
        struct.pack("=I", 9),
        struct.pack("=5I", 1, 1001, 7, 0, 1) + ip("10.1.0.9") + macs,
    )
    write(folder, "local4", ip("10.1.0.9"), struct.pack("=I", 9))
    write(folder, "ipcache4", ip("10.1.0.9"), struct.pack("=2I", 1001, 0))
    write(
        folder,
        "ipcache4_prefix",
        struct.pack("=I", 8) + ip("10.0.0.0"),
        struct.pack("=2I", 16777217, 0),
    )
    write(folder, "policy_slot", struct.pack("=I", 7), struct.pack("=I", 41))
    write(folder, "policy_peer", struct.pack("=2I", 7, 0), struct.pack("=2IH2B", 5, 2, 0, 0, 1))
    write(folder, "policy_port", struct.pack("=IHBx", 5, 0x5000, 6), struct.pack("=IHBx", 31, 0, 1))
    for addresses, initiator in (
        (("10.1.0.9", "10.1.0.200"), 0),
        (("9.0.0.10", "10.0.0.9"), 0),
        (("9.0.0.10", "10.0.0.8"), CtFlags.INITIATOR_1),
    ):
        key = b"".join(map(ip, addresses)) + b"\x0f\xa0\0\x50" + b"\6\0\0\0"
        side = struct.pack("=3IHBx", 7, 41, 31, 0, 1)
        head = struct.pack("=5Q4I", 1, 2, 3, 4, 5, 2 | initiator, 1001, 1002, 0)
        write(folder, "ct4", key, head + side + side)


def test_rows_and_flows_of_the_first_layout_are_carried_over_once(
    bpf_dir: Path, first_maps: Path
) -> None:
    fill(first_maps)
    opened = Datapath.open(built_object(), bpf_dir, SMALL)
    t = opened.tables
    address = int(IPv4Address("10.1.0.9"))
    row = Endpoint(1, 1001, 7, 0, EndpointFlags.READY, address, b"abcdef", b"ghijkl")
    assert dict(t.endpoints.items()) == {9: row}
    assert dict(t.local4.items()) == {address: LocalEndpoint(9)}
    assert dict(t.ipcache4.items()) == {address: IpcacheEntry(1001)}
    assert dict(t.ipcache4_prefix.items()) == {Prefix4(8, 10 << 24): IpcacheEntry(16777217)}
    assert t.policy_slot.get(7) == PolicySlot(41)
    assert dict(t.policy_peer.items()) == {
        PolicyPeerKey(7, 0): PolicyPeer(5, 2, 0, Verdict.NONE, PeerFlags.HAS_PORTS)
    }
    assert dict(t.policy_port.items()) == {
        PolicyPortKey(5, 80, 6): PolicyAnswer(31, 0, Verdict.ALLOW)
    }
    began = {}
    for key, entry in t.ct.items():
        at = bool(entry.flags & CtFlags.INITIATOR_1)
        began[str(plain(key.addr[at]))] = (str(plain(key.addr[not at])), key.port[at])
        assert (entry.packets, entry.octets, entry.ingress.rule_id) == ((2, 3), (4, 5), 31)
    assert began == {
        "10.1.0.9": ("10.1.0.200", 4000),
        "9.0.0.10": ("10.0.0.9", 4000),
        "10.0.0.8": ("9.0.0.10", 80),
    }

    t.policy_peer.delete_many([PolicyPeerKey(7, 0)])
    again = Datapath.open(built_object(), bpf_dir, SMALL)  # killed before it exchanged programs
    assert again.tables.policy_peer.count() == 0
    assert again.replace_programs() == 0
    assert not first_maps.exists()
    opened.close()
    again.close()


@pytest.mark.parametrize("turned", [False, True])
def test_a_flow_carried_over_has_the_key_the_programs_look_for(
    node: KernelNode, alice: Workload, bob: Workload, turned: bool
) -> None:
    for port in (53, 40000):
        node.inject(alice, udp_packet(alice, bob, 4000, port))
    for key, entry in list(node.tables.ct.items()):
        ends = [*zip(key.addr, key.port, strict=True)][:: -1 if turned else 1]
        old = struct.pack(
            "!2I2HB3x", *(a & 0xFFFFFFFF for a, _ in ends), *(p for _, p in ends), key.proto
        )
        flags = entry.flags ^ (CtFlags.INITIATOR_1 if turned else 0)
        packed = dataclasses.replace(entry, flags=flags).pack()
        assert migrate.carried_flows(old, packed, 1) == (key.pack(), entry.pack())
