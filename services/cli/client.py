"""HTTP to the two doors a command uses: apid over TCP and the node's agent over its unix socket.

Built on http.client, so that a command is on the wire before an async stack would be imported.
Every failure leaves here as one of the tree in services.runtime.errors, in one line.
"""

from __future__ import annotations

import http.client
import json
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import quote, urlencode, urlsplit

from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
    Unusable,
)

DEADLINE_S = 15.0
# The most that apid gives at once.
PAGE = 10_000
# A stream says something every 15 s; without a word for this long the connection is dead.
SILENCE_S = 40.0
RECONNECT_S = 1.0
RELISTS = 2
PROBLEM = "problem"
_NO_HEADERS: Mapping[str, str] = {}
_NO_QUERY: Mapping[str, str | int] = {}

_BY_STATUS: dict[int, type[TesseraError]] = {
    404: NotFound,
    409: Conflict,
    410: Conflict,
    412: Unusable,
    501: Unusable,
    503: Retry,
    504: Retry,
    507: Exhausted,
}
# Where the status alone says too little.
_BY_TYPE: dict[str, type[TesseraError]] = {"urn:tessera:problem:precondition-failed": Conflict}


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    body: bytes

    @property
    def ok(self) -> bool:
        return 200 <= self.status < 300


@dataclass(frozen=True, slots=True)
class Event:
    """Of a server-sent stream. `id` is empty where a reader cannot resume behind it. `problem`
    events are the server's last words, or ours about a broken connection."""

    name: str
    data: bytes
    id: str = ""

    def to_json(self) -> str:
        """On one line."""
        at = {"id": self.id} if self.id else {}
        return json.dumps({"event": self.name, **at, "data": json.loads(self.data)})


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout_s: float | None) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True, slots=True)
class Client:
    """One door. `what` and `remedy` word the line printed when nobody answers there."""

    address: str
    what: str
    remedy: str

    def exchange(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int] = _NO_QUERY,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        deadline_s: float = DEADLINE_S,
    ) -> Reply:
        """One request; the answer whatever its status. Raises only when there is no answer."""
        connection = self._connection(deadline_s)
        try:
            connection.request(method, _target(path, query), body=body, headers=dict(headers))
            response = connection.getresponse()
            return Reply(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error, deadline_s) from error
        finally:
            connection.close()

    def request(
        self,
        method: str,
        path: str,
        query: Mapping[str, str | int] = _NO_QUERY,
        body: bytes | None = None,
        headers: Mapping[str, str] = _NO_HEADERS,
        deadline_s: float = DEADLINE_S,
    ) -> bytes:
        reply = self.exchange(method, path, query, body, headers, deadline_s)
        if not reply.ok:
            raise failure(reply)
        return reply.body

    def get(
        self,
        path: str,
        query: Mapping[str, str | int] = _NO_QUERY,
        deadline_s: float = DEADLINE_S,
    ) -> bytes:
        return self.request("GET", path, query, deadline_s=deadline_s)

    def all_of(
        self, path: str, items: str, query: Mapping[str, str | int] = _NO_QUERY, at_most: int = 0
    ) -> bytes:
        """A list, as if it were one page. `items`: the field that grows. `at_most` 0: all of it.

        A list that changes faster than it can be read is begun anew; after some times it raises
        `Conflict`."""
        for _ in range(RELISTS):
            with suppress(Conflict):
                return self._pages(path, items, query, at_most)
        return self._pages(path, items, query, at_most)

    def _pages(self, path: str, items: str, query: Mapping[str, str | int], at_most: int) -> bytes:
        wanted = dict(query) | {"limit": min(at_most or PAGE, PAGE)}
        body = self.get(path, wanted)
        whole = json.loads(body)
        while (following := whole.get("next")) and (not at_most or len(whole[items]) < at_most):
            left = at_most - len(whole[items]) if at_most else PAGE
            wanted |= {"cursor": following, "limit": min(left, PAGE)}
            page = json.loads(self.get(path, wanted))
            whole[items] += page[items]
            whole["next"] = page.get("next", "")
        return json.dumps(whole).encode()

    def lines(self, path: str, query: Mapping[str, str | int] = _NO_QUERY) -> Iterator[bytes]:
        """The lines of a streamed answer as they arrive; ends when the server ends it."""
        connection = self._connection(None)
        try:
            connection.request("GET", _target(path, query))
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise failure(Reply(response.status, response.read()))
            while line := response.readline():
                yield line.rstrip(b"\n")
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error, DEADLINE_S) from error
        finally:
            connection.close()

    def events(self, path: str, query: Mapping[str, str | int] = _NO_QUERY) -> Iterator[Event]:
        """The events of a stream, endless: a connection that breaks is taken up again behind the
        last id, and told once. Raises when the first attempt fails, or a later one for good."""
        last_id, heard, told = "", False, False
        while True:
            try:
                for event in self._stream(path, query, last_id):
                    heard, told = True, False
                    last_id = event.id or last_id
                    yield event
            except Retry as error:
                if not heard:
                    raise
                if not told:
                    words = {"detail": f"{error}; trying again"}
                    yield Event(PROBLEM, json.dumps(words).encode())
                told = True
            time.sleep(RECONNECT_S)

    def _stream(self, path: str, query: Mapping[str, str | int], last_id: str) -> Iterator[Event]:
        connection = self._connection(SILENCE_S)
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        try:
            connection.request("GET", _target(path, query), headers=headers)
            response = connection.getresponse()
            if response.status != http.client.OK:
                raise failure(Reply(response.status, response.read()))
            yield from _events(iter(response.readline, b""))
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error, SILENCE_S) from error
        finally:
            connection.close()

    def _connection(self, timeout_s: float | None) -> http.client.HTTPConnection:
        if self.address.startswith("unix://"):
            return _UnixConnection(self.address.removeprefix("unix://"), timeout_s)
        url = urlsplit(self.address)
        try:
            port = url.port
        except ValueError:
            port = -1
        if url.scheme not in ("http", "https") or not url.hostname or port == -1:
            raise Invalid(
                f"{self.what} address {self.address!r} is not a URL; "
                "write it like http://127.0.0.1:7400 or unix:///run/tessera/agent.sock"
            )
        if url.scheme == "https":
            return http.client.HTTPSConnection(url.hostname, port, timeout=timeout_s)
        return http.client.HTTPConnection(url.hostname, port, timeout=timeout_s)

    def _unreachable(self, error: Exception, deadline_s: float) -> TesseraError:
        if isinstance(error, PermissionError):
            return Unusable(
                f"{self.what} at {self.address} may not be opened by this user: use root"
            )
        if isinstance(error, TimeoutError):
            reason = f"no answer within {deadline_s:g} s"
        elif isinstance(error, FileNotFoundError):
            reason = "no such socket"
        else:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        return Retry(f"{self.what} at {self.address} does not answer ({reason}); {self.remedy}")


def server(url: str) -> Client:
    return Client(
        url.rstrip("/"),
        "apid",
        "start the node with `tessera up`, or name another with --server or TESSERA_SERVER",
    )


def agent(path: str) -> Client:
    return Client(
        path if "://" in path else f"unix://{path}",
        "the node agent",
        "start the node with `tessera up`, or name its socket with --agent-socket "
        "or TESSERA_AGENT_SOCKET",
    )


def _events(lines: Iterator[bytes]) -> Iterator[Event]:
    fields: dict[bytes, bytes] = {}
    for line in lines:
        name, _, value = line.rstrip(b"\r\n").partition(b": ")
        if line in (b"\n", b"\r\n"):
            if b"data" in fields:
                at, name = fields.get(b"id", b""), fields.get(b"event", b"message")
                yield Event(name.decode(), fields[b"data"], at.decode())
            fields = {}
        elif name:  # a comment has none
            fields[name] = value


def segment(text: str) -> str:
    """One path segment; `/` inside a name must not become a separator."""
    return quote(text, safe="")


def failure(reply: Reply) -> TesseraError:
    """The server's own words (RFC 9457 `detail`) as the exception its status stands for."""
    problem = _problem(reply)
    by_status = _BY_STATUS.get(reply.status, Invalid if reply.status < 500 else Retry)
    kind = _BY_TYPE.get(str(problem.get("type")), by_status)
    words = problem.get("detail") or problem.get("title") or _fallback(reply)
    return kind(" ".join(str(words).split()))


def _problem(reply: Reply) -> dict[str, object]:
    try:
        problem = json.loads(reply.body)
    except ValueError:
        return {}
    return problem if isinstance(problem, dict) else {}


def _fallback(reply: Reply) -> str:
    return f"the server answered {reply.status} {http.client.responses.get(reply.status, '')}"


def _target(path: str, query: Mapping[str, str | int]) -> str:
    return f"{path}?{urlencode(query)}" if query else path
