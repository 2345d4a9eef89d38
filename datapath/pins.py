"""What a node keeps in bpffs: the folder, and maps of an earlier run that no longer fit.

<bpf_dir>/maps2/<map>           reused by the next agent; the number is the layout's
<bpf_dir>/links/<ifname>_in     tcx link of from_endpoint (the interface's ingress)
<bpf_dir>/links/<ifname>_out    tcx link of to_endpoint; _nin, _nout: of a node's device;
                                _vin, _vout: of the VXLAN device
<bpf_dir>/filters/<ifname>_in   the program a clsact filter of ours runs
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import Final

from datapath import bpfcall
from datapath.libbpf import MapSpec
from datapath.maps.tables import MAPS_DIR
from services.runtime.errors import Unusable

_BPFFS: Final = Path("/sys/fs/bpf")
_MAP_ARRAY: Final = 2
# Their rows are worth nothing to a later run.
_DISPOSABLE: Final = frozenset({"events", "metrics"})


def prepare(bpf_dir: Path) -> None:
    """Mounts bpffs where it is missing and makes `bpf_dir`."""
    if os.geteuid() != 0:
        raise Unusable("the datapath needs root (CAP_BPF, CAP_NET_ADMIN): run as root")
    if not _on_bpffs(bpf_dir):
        if not bpf_dir.is_relative_to(_BPFFS) or not _BPFFS.is_dir():
            raise Unusable(
                f"{bpf_dir} is not on a BPF file system: set [agent] bpf_dir to a folder below "
                f"{_BPFFS}, or mount one there (mount -t bpf bpf DIR)"
            )
        _mount()
    try:
        for folder in (MAPS_DIR, "links", "filters"):
            (bpf_dir / folder).mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise Unusable(f"cannot make {bpf_dir} on the BPF file system: {error.strerror}") from error


def _on_bpffs(path: Path) -> bool:
    best, kind = "", ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        head, _, tail = line.partition(" - ")
        point = head.split()[4]
        # The last mount over a point is the one that counts.
        if path.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, tail.split()[0]
    return kind == "bpf"


def _mount() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"bpf", os.fsencode(_BPFFS), b"bpf", 0, b"mode=0700"):
        reason = os.strerror(ctypes.get_errno())
        raise Unusable(f"cannot mount the BPF file system at {_BPFFS}: {reason}")


def pin_map(spec: MapSpec, path: Path) -> None:
    """Reuses the map pinned at `path`; one of another shape is replaced if nothing is in it."""
    try:
        fd = bpfcall.get_pinned(path)
    except FileNotFoundError:
        spec.pin_at(path)
        return
    try:
        found = bpfcall.map_info(fd)
        wanted = (spec.type, spec.key_size, spec.value_size, spec.max_entries, spec.flags)
        had = (found.type, found.key_size, found.value_size, found.max_entries, found.flags)
        if had != wanted:
            _give_up(spec, path, fd, found)
    finally:
        os.close(fd)
    spec.pin_at(path)


def _give_up(spec: MapSpec, path: Path, fd: int, found: bpfcall.MapInfo) -> None:
    if spec.name not in _DISPOSABLE and not _empty(fd, found):
        raise Unusable(
            f"BPF map {path} is in use with {found.max_entries} entries of "
            f"{found.key_size}+{found.value_size} bytes; this version and configuration want "
            f"{spec.max_entries} of {spec.key_size}+{spec.value_size}: set the old size again, or "
            f"drain the node and remove {path.parent.parent}"
        )
    path.unlink()


def _empty(fd: int, info: bpfcall.MapInfo) -> bool:
    if info.type == _MAP_ARRAY:
        page = bpfcall.map_lookup_batch(
            fd, None, info.max_entries, info.key_size, (info.value_size + 7) // 8 * 8
        )
        return not any(page.values)
    try:
        bpfcall.map_next_key(fd, None, info.key_size)
    except FileNotFoundError:
        return True
    return False
