"""rtnetlink(7) as far as Tessera needs it: requests packed, sent together, their answers read.

Owns the wire format (netlink.h, rtnetlink.h); what to ask is links.py's. A refusal is an OSError
with the kernel's errno. Not a general library: a request costs the kernel's time and little else,
where a general one costs several times that in the interpreter.
"""

from __future__ import annotations

import os
import socket
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from struct import pack, unpack_from
from typing import Final, Self

NEWLINK: Final = 16
DELLINK: Final = 17
NEWADDR: Final = 20
GETADDR: Final = 22
NEWROUTE: Final = 24
GETROUTE: Final = 26
NEWNEIGH: Final = 28

REPLACE: Final = 0x100
EXCL: Final = 0x200
CREATE: Final = 0x400

_REQUEST: Final = 0x1
_ACK: Final = 0x4
_DUMP: Final = 0x300
_DUMP_INTERRUPTED: Final = 0x10
_DUMP_ATTEMPTS: Final = 4
_ERROR: Final = 2
_DONE: Final = 3
_HEAD: Final = 16
_ROOM: Final = 1 << 16  # the kernel fills at most 32 KiB of a dump at a time


@dataclass(frozen=True, slots=True)
class Request:
    kind: int
    body: bytes
    flags: int = 0

    def pack(self, number: int) -> bytes:
        flags = self.flags | _REQUEST | (0 if self.flags & _DUMP == _DUMP else _ACK)
        return pack("=IHHII", _HEAD + len(self.body), self.kind, flags, number, 0) + self.body


@dataclass(frozen=True, slots=True)
class Reply:
    """`number`: of the request, counted from 0."""

    kind: int
    flags: int
    number: int
    body: bytes


class Refusal(OSError):
    """The kernel said no to request `at` of those asked together."""

    def __init__(self, code: int, at: int) -> None:
        super().__init__(code, os.strerror(code))
        self.at = at


def attribute(kind: int, value: bytes) -> bytes:
    size = 4 + len(value)
    return pack("=HH", size, kind) + value + bytes(-size % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """What follows a message's fixed head."""
    found: dict[int, bytes] = {}
    at = 0
    while at + 4 <= len(data):
        size, kind = unpack_from("=HH", data, at)
        if size < 4:
            break
        found[kind] = data[at + 4 : at + size]
        at += (size + 3) & ~3
    return found


class Netlink:
    """One socket, of the network namespace its maker's thread was in. Not for concurrent use."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
        self._unread: deque[Reply] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def ask(self, *requests: Request) -> None:
        """Carried out in order, also those behind a refused one; raises the first `Refusal`."""
        self._send(requests)
        first: Refusal | None = None
        for _ in requests:
            reply = self._next()
            (code,) = unpack_from("=i", reply.body)
            if code and first is None:
                first = Refusal(-code, reply.number)
        if first is not None:
            raise first

    def _send(self, requests: Sequence[Request]) -> None:
        parts = (request.pack(number) for number, request in enumerate(requests))
        # Bodies are made of attributes and heads of whole words: no message needs padding.
        self._socket.sendto(b"".join(parts), (0, 0))
        self._unread.clear()

    def _next(self) -> Reply:
        while not self._unread:
            self._unread.extend(_split(self._socket.recv(_ROOM)))
        return self._unread.popleft()

    def dump(self, kind: int, head: bytes) -> list[bytes]:
        """The bodies of all answers, unchanged from beginning to end of the reading."""
        for _ in range(_DUMP_ATTEMPTS):
            rows, whole = self._dump_once(Request(kind, head, _DUMP))
            if whole:
                break
        return rows

    def _dump_once(self, request: Request) -> tuple[list[bytes], bool]:
        self._send([request])
        rows: list[bytes] = []
        whole = True
        while (reply := self._next()).kind != _DONE:
            whole = whole and not reply.flags & _DUMP_INTERRUPTED
            if reply.kind == _ERROR:
                raise Refusal(-unpack_from("=i", reply.body)[0], 0)
            rows.append(reply.body)
        return rows, whole


def _split(datagram: bytes) -> Iterator[Reply]:
    at = 0
    while at + _HEAD <= len(datagram):
        size, kind, flags, number = unpack_from("=IHHI", datagram, at)
        yield Reply(kind, flags, number, datagram[at + _HEAD : at + size])
        at += (size + 3) & ~3
