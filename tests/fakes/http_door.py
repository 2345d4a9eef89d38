"""An HTTP server that answers from a table and remembers what it was asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from socketserver import ThreadingUnixStreamServer
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True, slots=True)
class Asked:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: bytes


@dataclass
class Door:
    """`answers`: (method, path) -> (status, body), or a list of such, the last one repeated."""

    answers: dict[tuple[str, str], object] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    address: str = ""

    def answer(self, asked: Asked) -> tuple[int, bytes]:
        self.asked.append(asked)
        found = self.answers.get((asked.method, asked.path), (404, b'{"detail":"no such thing"}'))
        if isinstance(found, list):
            found = found.pop(0) if len(found) > 1 else found[0]
        return found

    def paths(self, method: str) -> list[str]:
        return [asked.path for asked in self.asked if asked.method == method]


class _UnixServer(ThreadingUnixStreamServer):
    daemon_threads = True


def _handler(door: Door) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _serve(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("content-length", 0))
            headers = {key.lower(): value for key, value in self.headers.items()}
            query = dict(parse_qsl(url.query))
            body = self.rfile.read(length)
            status, answer = door.answer(Asked(self.command, url.path, query, headers, body))
            self.send_response(status)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        do_GET = do_POST = do_PUT = do_DELETE = _serve

        def log_message(self, format: str, *args: object) -> None: ...

        def address_string(self) -> str:
            return "peer"

    return Handler


@contextmanager
def http_door(answers: dict[tuple[str, str], object], socket: Path | None = None) -> Iterator[Door]:
    """`address` of the door is a URL; with `socket`, that path."""
    door = Door(answers)
    if socket is None:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(door))
        door.address = f"http://127.0.0.1:{server.server_address[1]}"
    else:
        server = _UnixServer(str(socket), _handler(door))
        door.address = str(socket)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield door
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
