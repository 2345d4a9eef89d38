"""Continuous traffic for tests that count every packet at the receiving side."""

from __future__ import annotations

import selectors
import socket
import threading
import time
from types import TracebackType
from typing import Self

from tests.fakes.netns import Namespace

_ROOM = 8 << 20
_SO_RCVBUFFORCE = 33  # asm-generic/socket.h; Python does not name it


class UdpStream:
    """Numbered datagrams at a steady pace from a bound socket; the receiver notes each number."""

    def __init__(self, source: Namespace, sink: Namespace, address: str, port: int) -> None:
        self._out = source.socket(socket.SOCK_DGRAM)
        self._out.connect((address, port))
        self._in = sink.socket(socket.SOCK_DGRAM)
        self._in.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _ROOM)
        self._in.bind(("0.0.0.0", port))
        self._in.setblocking(False)
        self._stop = threading.Event()
        self.sent = 0
        self.received: set[int] = set()
        self._threads = [threading.Thread(target=self._send), threading.Thread(target=self._take)]

    def _send(self) -> None:
        while not self._stop.wait(0.001):
            self._out.send(self.sent.to_bytes(8, "big"))
            self.sent += 1

    def _take(self) -> None:
        with selectors.DefaultSelector() as ready:
            ready.register(self._in, selectors.EVENT_READ)
            while True:
                if not ready.select(0.3):
                    if self._stop.is_set():
                        return
                    continue
                self.received.add(int.from_bytes(self._in.recv(64), "big"))

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stops sending, then takes what is still on its way."""
        self._stop.set()
        for thread in self._threads:
            thread.join()
        self._in.close()
        self._out.close()

    @property
    def lost(self) -> int:
        return self.sent - len(self.received)


class Connections:
    """New TCP connections one after the other, each proven by an echo."""

    def __init__(self, source: Namespace, sink: Namespace, address: str, port: int) -> None:
        self._source, self._address, self._port = source, address, port
        self._listener = sink.listen(port)
        self._stop = threading.Event()
        self.made = 0
        self.failed: list[str] = []
        self._threads = [threading.Thread(target=self._serve), threading.Thread(target=self._ask)]

    def _serve(self) -> None:
        self._listener.settimeout(0.2)
        while not self._stop.is_set():
            try:
                peer, _ = self._listener.accept()
            except TimeoutError:
                continue
            with peer:
                peer.settimeout(2)
                peer.sendall(peer.recv(64))

    def _ask(self) -> None:
        while not self._stop.wait(0.002):
            began = time.perf_counter()
            try:
                # Below TCP's first retransmission (1 s): one lost SYN is a failure here.
                with self._source.connect(self._address, self._port, timeout_s=0.8) as client:
                    client.sendall(b"here")
                    assert client.recv(16) == b"here"
            except OSError as error:
                self.failed.append(f"{error} after {time.perf_counter() - began:.2f} s")
            else:
                self.made += 1

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        for thread in reversed(self._threads):
            thread.join()
        self._listener.close()
