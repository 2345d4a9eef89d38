"""The agent's HTTP API on its unix socket.

POST   /v1/endpoints          make an endpoint; returns when it is judged and has its carrier
GET    /v1/endpoints[/REF]    REF: number or namespace/name
PUT    /v1/endpoints/REF/labels  other labels; returns when it has their identity
DELETE /v1/endpoints/REF
GET    /v1/status
GET    /v1/events?follow=1&last=N&verdict=...   newline-delimited flows (services/flows)

Errors are application/problem+json. The socket is for root and the socket's group.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from fcntl import LOCK_EX, LOCK_NB, flock
from http import HTTPStatus
from pathlib import Path

import msgspec
from aiohttp import web

from datapath.agent.endpoints import Endpoints
from datapath.agent.events import EventLog
from datapath.agent.record import EndpointRecord, State
from datapath.agent.requests import EndpointRequest, LabelsRequest, check_labels
from services.flows.filters import parse_filter
from services.flows.flow import encode_line
from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    Retry,
    TesseraError,
    Unusable,
)
from services.runtime.log import logger

log = logger(__name__)

SOCKET_NAME = "agent.sock"
LOCK_NAME = "agent.lock"
DEFAULT_LAST = 20
# Longer than relabel.py waits for a node that is not connected.
MOVE_DEADLINE_S = 30.0
_SHUTDOWN_S = 1.0  # a follower of events never ends by itself

_STATUS: dict[type[TesseraError], HTTPStatus] = {
    Invalid: HTTPStatus.UNPROCESSABLE_ENTITY,
    Conflict: HTTPStatus.CONFLICT,
    NotFound: HTTPStatus.NOT_FOUND,
    Retry: HTTPStatus.SERVICE_UNAVAILABLE,
    Exhausted: HTTPStatus.INSUFFICIENT_STORAGE,
    Unusable: HTTPStatus.PRECONDITION_FAILED,
}


class EndpointView(msgspec.Struct, frozen=True):
    """`ip6` empty: it has none. `interface`: the host side. `container`, `network`: a runtime's
    names, when it came by CNI."""

    id: int
    namespace: str
    name: str
    labels: tuple[str, ...]
    ip: str
    ip6: str
    identity: int
    interface: str
    netns: str
    state: str
    container: str
    network: str


def endpoint_view(record: EndpointRecord) -> EndpointView:
    return EndpointView(
        id=record.id,
        namespace=record.namespace,
        name=record.name,
        labels=record.labels,
        ip=record.ip if record.address else "",
        ip6=record.ip6,
        identity=record.identity,
        interface=record.outer,
        netns=record.netns,
        state=record.state.value,
        container=record.container,
        network=record.network,
    )


class Api:
    """Handlers only; the objects do the work."""

    def __init__(
        self,
        endpoints: Endpoints,
        events: EventLog,
        status: Callable[[], object],
        moved: Callable[[], Awaitable[None]],
    ) -> None:
        """`moved` returns when endpoints have the identities that their labels make."""
        self._moved = moved
        self._endpoints = endpoints
        self._events = events
        self._status = status

    def application(self) -> web.Application:
        app = web.Application(middlewares=[problems])
        app.add_routes(
            [
                web.post("/v1/endpoints", self.create),
                web.get("/v1/endpoints", self.list),
                web.get("/v1/endpoints/{ref:.+}", self.get),
                web.put("/v1/endpoints/{ref:.+}/labels", self.label),
                web.delete("/v1/endpoints/{ref:.+}", self.delete),
                web.get("/v1/status", self.status),
                web.get("/v1/events", self.events),
            ]
        )
        return app

    async def create(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=EndpointRequest)
        except msgspec.DecodeError as error:
            raise Invalid(f"endpoint request: {error}") from None
        made = await self._endpoints.create(body.wanted())
        return _json(endpoint_view(made), HTTPStatus.CREATED)

    async def list(self, _request: web.Request) -> web.Response:
        shown = [r for r in self._endpoints.records if r.state is not State.RELEASING]
        return _json({"endpoints": [endpoint_view(r) for r in sorted(shown, key=_by_id)]})

    async def get(self, request: web.Request) -> web.Response:
        return _json(endpoint_view(self._endpoints.find(request.match_info["ref"])))

    async def delete(self, request: web.Request) -> web.Response:
        gone = await self._endpoints.delete(request.match_info["ref"])
        return _json(msgspec.structs.replace(endpoint_view(gone), state="deleted"))

    async def label(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await request.read(), type=LabelsRequest)
        except msgspec.DecodeError as error:
            raise Invalid(f"labels request: {error}") from None
        found = self._endpoints.find(request.match_info["ref"])
        check_labels(found.namespace, body.labels)
        labelled = await self._endpoints.relabel(str(found.id), body.labels)
        try:
            async with asyncio.timeout(MOVE_DEADLINE_S):
                await self._moved()
        except TimeoutError:
            raise Retry(
                f"endpoint {labelled.ref} has its new labels and still its old identity: the "
                "control plane, or a node, does not answer; it moves by itself when it does"
            ) from None
        return _json(endpoint_view(self._endpoints.find(str(found.id))))

    async def status(self, _request: web.Request) -> web.Response:
        return _json(self._status())

    async def events(self, request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        follow = query.pop("follow", "") not in ("", "0", "false")
        last = query.pop("last", None if not follow else "0")
        if last is not None and not last.isdecimal():
            raise Invalid(f"last={last!r} is not a number")
        chosen = parse_filter(query)
        count = None if last is None else int(last)
        flows, following = self._events.last_flows(chosen, count)
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(request)
        await response.write(b"".join(map(encode_line, flows)))
        if follow:
            async for new, missed in self._events.follow_flows(chosen, following):
                if missed:
                    log.warning("events.reader_slow", count=missed)
                if new:
                    await response.write(b"".join(map(encode_line, new)))
        await response.write_eof()
        return response


def _by_id(record: EndpointRecord) -> int:
    return record.id


def _json(body: object, status: HTTPStatus = HTTPStatus.OK) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(body), status=status, content_type="application/json"
    )


@web.middleware
async def problems(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    try:
        return await handler(request)
    except TesseraError as error:
        status = next(code for kind, code in _STATUS.items() if isinstance(error, kind))
        return _problem(status, str(error))
    except web.HTTPException as error:
        if error.status < HTTPStatus.BAD_REQUEST:
            raise
        return _problem(HTTPStatus(error.status), f"{request.method} {request.path}")


def _problem(status: HTTPStatus, detail: str) -> web.Response:
    return web.Response(
        body=msgspec.json.encode({"title": status.phrase, "status": int(status), "detail": detail}),
        status=status,
        content_type="application/problem+json",
    )


# ------------------------------------------------------------------ the socket


@contextmanager
def only_agent(run_dir: Path) -> Iterator[None]:
    """Holds the node's lock. Raises `Unusable` while another agent has it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o755)
        lock = os.open(run_dir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    except OSError as error:
        raise Unusable(f"cannot use [agent] run_dir {run_dir}: {error.strerror}") from None
    try:
        try:
            flock(lock, LOCK_EX | LOCK_NB)
        except BlockingIOError:
            pid = os.pread(lock, 32, 0).decode().strip()
            raise Unusable(
                f"another agent runs here (pid {pid}): stop it, or give this one its own "
                "[agent] run_dir, state_dir and bpf_dir"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(lock)


@asynccontextmanager
async def serve(app: web.Application, path: Path) -> AsyncIterator[None]:
    """On a unix socket; a stale one is replaced. Call under `only_agent`."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=_SHUTDOWN_S)
    await runner.setup()
    listener = _listener(path)
    try:
        await web.SockSite(runner, listener).start()
        yield
    finally:
        await runner.cleanup()
        listener.close()
        os.unlink(path)


def _listener(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # The mode is set before anybody can connect.
    previous = os.umask(0o117)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise Unusable(f"cannot listen on {path}: {error.strerror}") from None
    finally:
        os.umask(previous)
    return listener
