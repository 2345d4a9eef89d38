"""The agent's side of the plugin: a request in, the specification's answer out.

    POST /v1/cni ─► parse ─► wait until nobody works on the same endpoint ─► decide ─► Endpoints
                      │                                                                   │
                      └────────── any refusal ──► code, message ◄─────────────────────────┘

The answer's status is 200 for a result and 422 for an error result; its body is what the plugin
prints. Nothing here keeps state: what a runtime has attached is in the endpoints' records.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Protocol

from aiohttp import web

from datapath.agent.endpoints import Endpoints, Wanted
from datapath.agent.record import INIT_LABELS, EndpointRecord
from datapath.agent.requests import check_labels, check_name, check_static
from datapath.cni import decide, workload
from datapath.cni.request import Request, parse, split, version_of
from datapath.cni.result import Seen, differences, expected_result, result
from datapath.cni.spec import (
    CniError,
    Code,
    Command,
    VersionResult,
    as_cni,
    encode,
    error_result,
)
from services.runtime.errors import Conflict, NotFound, Retry, TesseraError
from services.runtime.log import logger

log = logger(__name__)

# Longer than any creation may take (POLICY_DEADLINE_S and the calls before it).
REST_DEADLINE_S = 30.0


class Machine(Protocol):
    """Every call blocks, and runs in a thread."""

    def netns_exists(self, netns: str) -> bool: ...
    def see(self, record: EndpointRecord) -> Seen: ...


@dataclass(frozen=True, slots=True)
class Cni:
    """`away`: why endpoints could not be made now; empty when they can. `vanished`: as in
    endpoints.py. `labels_dir`: see workload.py."""

    endpoints: Endpoints
    machine: Machine
    away: Callable[[], str]
    vanished: Callable[[list[EndpointRecord]], list[EndpointRecord]]
    labels_dir: Path

    def routes(self) -> Iterable[web.RouteDef]:
        return [web.post("/v1/cni", self.handle)]

    async def handle(self, request: web.Request) -> web.Response:
        done, body = await self.answer(await request.read())
        status = HTTPStatus.OK if done else HTTPStatus.UNPROCESSABLE_ENTITY
        return web.Response(body=body, status=status, content_type="application/json")

    async def answer(self, body: bytes) -> tuple[bool, bytes]:
        """Whether it was done, and what the plugin prints."""
        stdin = b""
        try:
            environ, stdin = split(body)
            request = parse(environ, stdin)
            return True, await self._does()[request.command](request)
        except TesseraError as error:
            refusal = as_cni(error)
            log.warning("cni.refused", code=int(refusal.code), error=str(refusal))
            return False, encode(error_result(refusal, version_of(stdin)))

    def _does(self) -> Mapping[Command, Callable[[Request], Awaitable[bytes]]]:
        return {
            Command.ADD: self._add,
            Command.DEL: self._del,
            Command.CHECK: self._check,
            Command.GC: self._gc,
            Command.STATUS: self._status,
            Command.VERSION: self._version,
        }

    # -------------------------------------------------------------- commands

    async def _add(self, request: Request) -> bytes:
        decide.refuse_chained(request)
        wanted = await self._wanted(request)
        while True:
            try:
                return encode(result(await self._attached(request, wanted), request))
            except Conflict:
                # The same call twice, and the other was a moment earlier: its answer is ours.
                if not decide.attachments(
                    self.endpoints.records, request.container, request.interface
                ):
                    raise

    async def _attached(self, request: Request, wanted: Wanted) -> EndpointRecord:
        await self._rest(
            record
            for record in self.endpoints.records
            if record.key == (wanted.namespace, wanted.name)
            or (record.container, record.interface) == (request.container, request.interface)
        )
        match decide.addition(request, wanted, self.endpoints.records, self._lives):
            case decide.Answer(record):
                return record
            case decide.Replace(old):
                await self._remove([old])
            case decide.Make():
                pass
        return await self.endpoints.create(wanted)

    async def _wanted(self, request: Request) -> Wanted:
        if not await asyncio.to_thread(self.machine.netns_exists, request.netns):
            raise CniError(
                Code.UNKNOWN_CONTAINER,
                f"there is no network namespace {request.netns}",
                "if it exists for you, the agent does not see it: it must share the mount "
                "propagation of the folder the runtime keeps namespaces in",
            )
        namespace, name = workload.namespace_of(request), workload.name_of(request)
        check_name(namespace, name)
        file = self.labels_dir / namespace / name
        text = await asyncio.to_thread(_text, file)
        labels = workload.labels_of(request, text)
        check_labels(namespace, labels)
        static = workload.addresses_of(request)
        check_static(static)
        return Wanted(
            namespace,
            name,
            INIT_LABELS if not labels and workload.is_pod(request) else labels,
            request.netns,
            request.interface,
            container=request.container,
            network=request.config.name,
            mtu=request.config.mtu,
            routes=tuple(route.dst for route in request.config.routes),
            pool=workload.pool_of(request),
            static=static,
            mac=workload.mac_of(request),
        )

    async def _del(self, request: Request) -> bytes:
        found = decide.attachments(self.endpoints.records, request.container, request.interface)
        await self._remove(found)
        return b""

    async def _check(self, request: Request) -> bytes:
        expected_result(request)
        found = decide.attachments(self.endpoints.records, request.container, request.interface)
        await self._rest(found)
        record = next((self._now(one) for one in found), None)
        if record is None:
            raise CniError(
                Code.NOT_AS_ADDED,
                f"container {request.container} has no interface {request.interface} of tessera",
            )
        seen = await asyncio.to_thread(self.machine.see, record)
        if wrong := list(differences(request, record, seen)):
            raise CniError(
                Code.NOT_AS_ADDED, f"endpoint {record.ref}: {wrong[0]}", "; ".join(wrong[1:])
            )
        return b""

    async def _gc(self, request: Request) -> bytes:
        await self._remove(decide.garbage(request, self.endpoints.records))
        return b""

    async def _status(self, _request: Request) -> bytes:
        if reason := self.away():
            raise CniError(Code.NOT_AVAILABLE, reason)
        return b""

    async def _version(self, request: Request) -> bytes:
        return encode(VersionResult(request.version))

    # -------------------------------------------------------------- endpoints

    async def _remove(self, records: Iterable[EndpointRecord]) -> None:
        """Whoever else removes one of them meanwhile does what was asked for."""
        for record in records:
            await self._rest([record])
            try:
                await self.endpoints.delete(str(record.id))
            except NotFound:
                continue

    async def _rest(self, records: Iterable[EndpointRecord]) -> None:
        """Raises `Retry` when one of them is worked on for too long."""
        for record in records:
            try:
                async with asyncio.timeout(REST_DEADLINE_S):
                    await self.endpoints.at_rest(record)
            except TimeoutError:
                raise Retry(
                    f"endpoint {record.ref} is being created or deleted for more than "
                    f"{REST_DEADLINE_S:g} s; ask again later"
                ) from None

    def _now(self, record: EndpointRecord) -> EndpointRecord | None:
        return next((one for one in self.endpoints.records if one.id == record.id), None)

    def _lives(self, record: EndpointRecord) -> bool:
        return not self.vanished([record])


def _text(path: Path) -> str | None:
    try:
        return path.read_text()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise Conflict(f"labels file {path} cannot be read: {error}") from None
