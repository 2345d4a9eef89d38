"""Real network namespaces for tests, and sockets inside them.

A socket belongs to the namespace of the thread that made it, so a test makes sockets in many
namespaces and uses them from its own thread: no helper processes, no output to parse.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from datapath.netns import netns_path, run_in

T = TypeVar("T")
_counter = itertools.count()


class Namespace:
    """Made by `namespace()` or `Namespace.create`; `delete` is the maker's duty."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.path = str(netns_path(name))
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)

    @classmethod
    def create(cls, prefix: str = "tsr-test") -> Namespace:
        name = f"{prefix}-{os.getpid()}-{next(_counter)}"
        subprocess.run(["ip", "netns", "add", name], check=True, capture_output=True)
        made = cls(name)
        made.ip("link set lo up")
        return made

    def delete(self) -> None:
        os.close(self._fd)
        subprocess.run(["ip", "netns", "del", self.name], check=True, capture_output=True)

    def call(self, work: Callable[[], T]) -> T:
        """Runs `work` in a thread inside."""
        return run_in(self._fd, work)

    def ip(self, command: str) -> str:
        """`ip -n NAME COMMAND`; its output."""
        words = ["ip", "-n", self.name, *command.split()]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout

    def sysctl(self, path: str, value: str) -> None:
        """`path`: below /proc/sys/net."""

        def write() -> None:
            with open(f"/proc/sys/net/{path}", "w") as file:
                file.write(value)

        self.call(write)

    def run(self, source: str, *args: str, timeout_s: float = 10.0) -> str:
        """A Python snippet as a process inside; its output."""
        words = ["nsenter", f"--net={self.path}", sys.executable, "-c", source, *args]
        done = subprocess.run(words, check=True, capture_output=True, text=True, timeout=timeout_s)
        return done.stdout

    def socket(self, kind: int, proto: int = 0, family: int = socket.AF_INET) -> socket.socket:
        return self.call(lambda: socket.socket(family, kind, proto))

    def listen(self, port: int, address: str = "0.0.0.0") -> socket.socket:
        """A TCP listener with a one second timeout on accept."""
        listener = self.socket(socket.SOCK_STREAM, family=_family(address))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen(16)
        listener.settimeout(1.0)
        return listener

    def connect(
        self, address: str, port: int, *, timeout_s: float = 0.5, source_port: int = 0
    ) -> socket.socket:
        """TimeoutError where nothing answers."""
        client = self.socket(socket.SOCK_STREAM, family=_family(address))
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        client.settimeout(timeout_s)
        try:
            if source_port:
                client.bind(("", source_port))
            client.connect((address, port))
        except BaseException:
            client.close()
            raise
        return client

    def can_connect(self, address: str, port: int, *, timeout_s: float = 0.5) -> bool:
        try:
            self.connect(address, port, timeout_s=timeout_s).close()
        except TimeoutError:
            return False
        return True

    def udp(self, port: int = 0, address: str = "0.0.0.0") -> socket.socket:
        """Bound, with a half second timeout on receiving."""
        sock = self.socket(socket.SOCK_DGRAM, family=_family(address))
        sock.bind((address, port))
        sock.settimeout(0.5)
        return sock

    def ping(self, address: str, *, ident: int = 4711, timeout_s: float = 0.5) -> bool:
        """One ICMP echo request; whether its reply came."""
        six = ":" in address
        proto = socket.IPPROTO_ICMPV6 if six else socket.IPPROTO_ICMP
        answer = 129 if six else 0
        with self.socket(socket.SOCK_RAW, proto, _family(address)) as sock:
            sock.settimeout(timeout_s)
            sock.sendto(icmp_echo(ident, kind=128 if six else 8), (address, 0))
            try:
                while True:
                    data, _ = sock.recvfrom(2048)
                    icmp = data if six else data[(data[0] & 15) * 4 :]
                    if icmp[0] == answer and struct.unpack("!H", icmp[4:6])[0] == ident:
                        return True
            except TimeoutError:
                return False


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


@contextmanager
def namespace(prefix: str = "tsr-test") -> Iterator[Namespace]:
    made = Namespace.create(prefix)
    try:
        yield made
    finally:
        made.delete()


def checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def icmp_echo(ident: int, *, kind: int = 8, seq: int = 1) -> bytes:
    head = struct.pack("!BBHHH", kind, 0, 0, ident, seq)
    return head[:2] + struct.pack("!H", checksum(head)) + head[4:]
