"""Network namespaces of the demo and sockets that live in them.

A socket belongs for good to the namespace its thread was in when it was made. So one process can
listen and connect everywhere: step in, make the socket, step back out, all without an await.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from services.runtime.errors import Unusable

PREFIX = "tessera-demo-"
NETNS_DIR = Path("/run/netns")
OUTSIDE = f"{PREFIX}outside"
# The host's end of the cable to OUTSIDE; an interface name holds 15 bytes.
OUTSIDE_LINK = "tsrdemo0"

_CLONE_NEWNET = 0x40000000
_LIBC = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Netns:
    """`name` empty: the host's own."""

    name: str = ""

    @property
    def path(self) -> Path:
        return NETNS_DIR / self.name

    def socket(self, kind: socket.SocketKind, proto: int = 0) -> socket.socket:
        """A non-blocking IPv4 socket in this namespace."""
        with self._entered():
            made = socket.socket(socket.AF_INET, kind, proto)
        made.setblocking(False)
        return made

    @contextmanager
    def _entered(self) -> Iterator[None]:
        if not self.name:
            yield
            return
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                _setns(there)
                yield
            finally:
                _setns(home)
                os.close(there)
        finally:
            os.close(home)


def _setns(descriptor: int) -> None:
    if _LIBC.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def create(name: str) -> Netns:
    _ip("netns", "add", PREFIX + name)
    return Netns(PREFIX + name)


def create_outside(gateway: str, addresses: tuple[str, ...], prefix: int) -> Netns:
    """A network behind the host, with no agent on it: what policy calls the world."""
    _ip("netns", "add", OUTSIDE)
    _ip("link", "add", OUTSIDE_LINK, "type", "veth", "peer", "name", "eth0", "netns", OUTSIDE)
    _ip("addr", "add", f"{gateway}/{prefix}", "dev", OUTSIDE_LINK)
    _ip("link", "set", OUTSIDE_LINK, "up")
    for address in addresses:
        _ip("-n", OUTSIDE, "addr", "add", f"{address}/{prefix}", "dev", "eth0")
    _ip("-n", OUTSIDE, "link", "set", "eth0", "up")
    _ip("-n", OUTSIDE, "route", "add", "default", "via", gateway)
    return Netns(OUTSIDE)


def remove_all() -> None:
    """Every namespace of the demo and the cable, a killed run's included."""
    # The kernel takes a namespace apart some time after its name is gone: the cable goes first.
    if (Path("/sys/class/net") / OUTSIDE_LINK).exists():
        _ip("link", "delete", OUTSIDE_LINK)
    if not NETNS_DIR.is_dir():
        return
    for path in NETNS_DIR.iterdir():
        if path.name.startswith(PREFIX):
            _ip("netns", "delete", path.name)


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise Unusable("no `ip` command on PATH: install iproute2") from error
    if done.returncode != 0:
        raise Unusable(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
