"""What benchmarks look through: HTTP without a library in between, and rows of pinned maps."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datapath import bpfcall

DEADLINE_S = 60.0
# The kernel adds its timer slack, 50 us; less would take a core from those who are measured.
PAUSE_S = 50e-6


class Door:
    """One kept connection to a unix socket; a request leaves before its answer is awaited."""

    def __init__(self, path: Path) -> None:
        self._sock = socket.socket(socket.AF_UNIX)
        self._sock.settimeout(DEADLINE_S)
        self._sock.connect(str(path))
        self._got = b""

    def send(self, method: str, path: str, body: bytes = b"") -> None:
        head = f"{method} {path} HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(body)}\r\n\r\n"
        self._sock.sendall(head.encode() + body)

    def answered(self) -> Any | None:
        """The answer if all of it is here."""
        try:
            self._take(self._sock.recv(1 << 20, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return None
        return self._parse()

    def answer(self) -> Any:
        while (found := self._parse()) is None:
            self._take(self._sock.recv(1 << 20))
        return found

    def ask(self, method: str, path: str, body: bytes = b"") -> Any:
        self.send(method, path, body)
        return self.answer()

    def close(self) -> None:
        self._sock.close()

    def _take(self, data: bytes) -> None:
        assert data, "the door was closed"
        self._got += data

    def _parse(self) -> Any | None:
        head, blank, rest = self._got.partition(b"\r\n\r\n")
        if not blank:
            return None
        lines = head.decode().split("\r\n")
        fields = {k.strip().lower(): v for k, _, v in (line.partition(":") for line in lines[1:])}
        size = int(fields["content-length"])
        if len(rest) < size:
            return None
        self._got = rest[size:]
        body = json.loads(rest[:size])
        assert lines[0].split()[1].startswith("2"), f"{lines[0]}: {body}"
        return body


class Rows:
    """Rows of a pinned map by packed key; about 2 us each, the interpreter's share included."""

    def __init__(self, path: Path, value_size: int) -> None:
        self.fd = bpfcall.get_pinned(path)
        self._value_size = value_size

    def value(self, key: bytes) -> bytes | None:
        try:
            return bpfcall.map_lookup(self.fd, key, self._value_size)
        except FileNotFoundError:
            return None

    def await_all(self, keys: list[bytes]) -> float:
        """When the last of `keys` was seen. They are walked through as they come, in the order
        they were asked for, so that what is left to look at in the end is short."""
        for key in keys:
            until(lambda key=key: self.value(key) is not None)
        return time.perf_counter()


def until(check: Callable[[], bool]) -> float:
    """When `check` was first true."""
    end = time.perf_counter() + DEADLINE_S
    while not check():
        assert time.perf_counter() < end, f"not within {DEADLINE_S:g} s"
        time.sleep(PAUSE_S)
    return time.perf_counter()
