"""Listeners and probes. Every listener echoes; a probe has passed only when its echo came back.

A probe says what happened to its packets and nothing about why; the why is the node's to say.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Self, cast

from services.cli.demo.netns import Netns
from services.cli.demo.scenario import Seen

# A drop shows as silence.
SILENCE_S = 1.0
# TCP repeats its first SYN after 1 s and 3 s: a lost packet costs a pass time, not its verdict.
PATIENCE_S = 5.0
_PAYLOAD = b"tessera"
_ECHO_REPLY, _ECHO_REQUEST = 0, 8
_IPV4_HEADER = 20
_REFUSED = frozenset({errno.ECONNREFUSED, errno.ECONNRESET, errno.EPIPE})


@dataclass(frozen=True, slots=True)
class Station:
    """Where probes start or end: `address` "" leaves the source to the routing table."""

    netns: Netns
    address: str = ""
    tcp: tuple[int, ...] = ()
    udp: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Sent:
    """What a probe used, to find it among the flows, and what became of it."""

    source_ip: str
    source_port: int
    seen: Seen


# ------------------------------------------------------------------ listening


class _TcpEcho(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._transport.write(data)


class _UdpEcho(asyncio.DatagramProtocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # asyncio's own transport is none by inheritance (3.11), only by its methods.
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str | int, int]) -> None:
        self._transport.sendto(data, addr)


@asynccontextmanager
async def listening(stations: Iterable[Station]) -> AsyncIterator[None]:
    loop = asyncio.get_running_loop()
    open_: list[asyncio.Server | asyncio.DatagramTransport] = []
    try:
        for station in stations:
            for port in station.tcp:
                listener = _bound(station.netns, socket.SOCK_STREAM, port)
                open_.append(await loop.create_server(_TcpEcho, sock=listener))
            for port in station.udp:
                listener = _bound(station.netns, socket.SOCK_DGRAM, port)
                transport, _ = await loop.create_datagram_endpoint(_UdpEcho, sock=listener)
                open_.append(transport)
        yield
    finally:
        for one in open_:
            one.close()


def _bound(netns: Netns, kind: socket.SocketKind, port: int) -> socket.socket:
    listener = netns.socket(kind)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("0.0.0.0", port))
    return listener


# ------------------------------------------------------------------ probing


class Talk:
    """One TCP or UDP exchange partner; may be used again later, to see a live connection cut."""

    def __init__(self, source: Station, kind: socket.SocketKind) -> None:
        self._socket = source.netns.socket(kind)
        if source.address:
            self._socket.bind((source.address, 0))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._socket.close()

    async def open(self, ip: str, port: int, patience_s: float) -> Sent:
        """Connect and one exchange."""
        seen = await _outcome(self._connect_and_ask(ip, port), patience_s)
        return self._sent(seen)

    async def ask(self, patience_s: float) -> Sent:
        """One more exchange on what is already connected."""
        return self._sent(await _outcome(self._ask(), patience_s))

    async def _connect_and_ask(self, ip: str, port: int) -> None:
        await asyncio.get_running_loop().sock_connect(self._socket, (ip, port))
        await self._ask()

    async def _ask(self) -> None:
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(self._socket, _PAYLOAD)
        if not await loop.sock_recv(self._socket, len(_PAYLOAD)):
            raise ConnectionResetError(errno.ECONNRESET, "closed by the other end")

    def _sent(self, seen: Seen) -> Sent:
        # Set by connect() at once, long before it completes.
        ip, port = self._socket.getsockname()
        return Sent(ip, port, seen)


async def ping(source: Station, ip: str, patience_s: float) -> Sent:
    """One ICMP echo request."""
    with source.netns.socket(socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw:
        if source.address:
            raw.bind((source.address, 0))
        raw.connect((ip, 0))
        seen = await _outcome(_echo(raw), patience_s)
        return Sent(raw.getsockname()[0], 0, seen)


async def _echo(raw: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ident = os.getpid() & 0xFFFF
    head = struct.pack("!BBHHH", _ECHO_REQUEST, 0, 0, ident, 1)
    checksum = _internet_checksum(head + _PAYLOAD)
    head = struct.pack("!BBHHH", _ECHO_REQUEST, 0, checksum, ident, 1)
    await loop.sock_sendall(raw, head + _PAYLOAD)
    while True:
        packet = await loop.sock_recv(raw, 1024)
        kind, _, _, answered, _ = struct.unpack_from("!BBHHH", packet, _IPV4_HEADER)
        if (kind, answered) == (_ECHO_REPLY, ident):
            return


def _internet_checksum(data: bytes) -> int:
    """RFC 1071."""
    padded = data + b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(padded) // 2}H", padded))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


async def _outcome(exchange: Awaitable[None], patience_s: float) -> Seen:
    try:
        async with asyncio.timeout(patience_s):
            await exchange
    except TimeoutError:
        return Seen.DROPPED
    except OSError as error:
        return Seen.REFUSED if error.errno in _REFUSED else Seen.UNREACHABLE
    return Seen.FORWARDED
