"""What a machine must offer before a node starts on it; each lack is one `Unusable` line."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from services.cli.layout import Layout
from services.runtime.errors import Unusable

BPFFS = Path("/sys/fs/bpf")
# etcd preallocates 64 MB for its write-ahead log and as much for the next file of it.
ROOM_BYTES = 160 << 20


def require_root(what: str) -> None:
    if os.geteuid() != 0:
        raise Unusable(f"{what} needs root: it creates interfaces and loads BPF programs; use sudo")


def require_etcd() -> None:
    if shutil.which("etcd") is None:
        raise Unusable(
            "no etcd binary on PATH: install one (Debian: apt-get install etcd-server) or pass "
            "--etcd-endpoints to use a running one"
        )


def require_bpffs(bpf_dir: Path, mounts: Path = Path("/proc/self/mounts")) -> bool:
    """True when it had to be mounted first."""
    if _inside_bpffs(bpf_dir, mounts):
        return False
    if not bpf_dir.is_relative_to(BPFFS):
        raise Unusable(
            f"BPF directory {bpf_dir} is not in a bpf filesystem; choose one under {BPFFS} "
            "or mount one there (mount -t bpf bpf DIR)"
        )
    done = subprocess.run(
        ["mount", "-t", "bpf", "bpf", str(BPFFS)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        why = done.stderr.partition("\n")[0].removeprefix(f"mount: {BPFFS}: ").rstrip(".")
        raise Unusable(
            f"cannot mount a bpf filesystem on {BPFFS}: {why}; mount it from outside "
            f"(mount -t bpf bpf {BPFFS}) or give this container CAP_SYS_ADMIN"
        )
    return True


def _inside_bpffs(path: Path, mounts: Path) -> bool:
    """Whether the deepest mount above `path` is of type bpf."""
    above = [
        (len(Path(point).parts), kind)
        for _, point, kind, *_ in (line.split() for line in mounts.read_text().splitlines())
        if path.is_relative_to(point)
    ]
    # Later mounts hide earlier ones at the same place, and max() keeps the first of equals.
    return max(reversed(above), key=lambda one: one[0])[1] == "bpf"


def require_ports(wanted: Mapping[str, str]) -> None:
    """`wanted`: address -> what listens there. Sockets and empty addresses are passed over."""
    for address, owner in wanted.items():
        host, _, port = address.rpartition(":")
        if not host or address.startswith("unix:") or not port.isdecimal():
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, int(port)))
            except OSError as error:
                raise Unusable(
                    f"{address} is needed for {owner} and cannot be had ({error.strerror}): stop "
                    "what listens there, or set another address in the configuration file"
                ) from error


def make_directories(layout: Layout) -> None:
    for path in (layout.state_dir, layout.run_dir, layout.log_dir):
        try:
            path.mkdir(
                mode=0o700 if path == layout.state_dir else 0o755, parents=True, exist_ok=True
            )
        except OSError as error:
            raise Unusable(
                f"cannot create {path}: {error.strerror}; choose another place with --state-dir "
                "and --run-dir"
            ) from error
        _require_writable(path)


def _require_writable(folder: Path) -> None:
    """An unwritable or full place shows itself here, not in the middle of something."""
    probe = folder / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(b"\0")
            os.fsync(file.fileno())
    except OSError as error:
        raise Unusable(
            f"cannot write to {folder}: {error.strerror}; make room or choose another place with "
            "--state-dir and --run-dir"
        ) from error
    finally:
        with suppress(OSError):
            probe.unlink(missing_ok=True)


def require_room(etcd_data: Path) -> None:
    """For an etcd that is to begin; one that has data may go on with little."""
    if etcd_data.exists():
        return
    free = shutil.disk_usage(etcd_data.parent).free
    if free < ROOM_BYTES:
        raise Unusable(
            f"{etcd_data.parent} has {free >> 20} MiB free and etcd needs {ROOM_BYTES >> 20} to "
            "begin: make room or choose another place with --state-dir"
        )


@contextmanager
def only_one(lock_file: Path, what: str) -> Iterator[None]:
    """Holds `lock_file` while the block runs; the kernel lets go of it with the process."""
    descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            owner = os.read(descriptor, 32).decode().strip() or "unknown"
            raise Unusable(
                f"{what} already runs here (process {owner}, lock {lock_file}); "
                "stop it first, or choose other directories"
            ) from error
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(descriptor)
