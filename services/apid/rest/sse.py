"""Server-sent events: what a handler's iterator yields, written to one client.

    generator ─pull──► queue of BUFFERED events ──► socket
                        full while the client is slow: the source is not asked for more

A client that falls behind costs a bounded queue here; whether it is told of a gap or of the newest
state is the source's to say, in an event of its own. Silence is broken by a comment, so that
proxies keep the connection and a dead one is found out. The stream ends when the source does, when
the client goes or takes nothing for WRITE_DEADLINE_S, and at shutdown.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

import msgspec
from aiohttp import web

from services.apid.rest.errors import told
from services.apid.rest.route import Event

EVENT_STREAM: Final = "text/event-stream"
PROBLEM: Final = "problem"
BUFFERED: Final = 256
# Under the idle time-outs of proxies, of which 30 s is the shortest in common use.
KEEP_ALIVE_S: Final = 15.0
WRITE_DEADLINE_S: Final = 60.0
# How soon a browser comes back.
_RETRY: Final = b"retry: 1000\n\n"
_KEEP_ALIVE: Final = b": keep-alive\n\n"
# Keeps nginx from collecting events into a buffer of its own.
_HEADERS: Final = {
    "Content-Type": EVENT_STREAM,
    "Cache-Control": "no-store",
    "X-Accel-Buffering": "no",
}


class Streams:
    """The open streams of one application."""

    def __init__(self, keep_alive_s: float = KEEP_ALIVE_S) -> None:
        self._open: set[_Connection] = set()
        self._stopping = False
        self._keep_alive_s = keep_alive_s

    def __len__(self) -> int:
        return len(self._open)

    async def serve(
        self, request: web.Request, events: AsyncGenerator[Event, None]
    ) -> web.StreamResponse:
        response = web.StreamResponse(headers=_HEADERS)
        connection = _Connection(response, self._keep_alive_s)
        self._open.add(connection)
        try:
            await response.prepare(request)
            await connection.run(events, ended=self._stopping)
        except* ConnectionResetError:
            pass  # the client went
        except* TimeoutError:
            if request.transport is not None:
                request.transport.abort()
        finally:
            self._open.discard(connection)
        return response

    async def stop(self, _app: web.Application) -> None:
        self._stopping = True
        for connection in self._open:
            connection.end()


class _Connection:
    def __init__(self, response: web.StreamResponse, keep_alive_s: float) -> None:
        self._response = response
        self._keep_alive_s = keep_alive_s
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(BUFFERED)
        self._pump: asyncio.Task[None] | None = None

    async def run(self, events: AsyncGenerator[Event, None], *, ended: bool) -> None:
        async with asyncio.TaskGroup() as tasks:
            self._pump = pump = tasks.create_task(self._fill(events))
            if ended:
                self.end()
            try:
                await self._write(_RETRY)
                while not (pump.done() and self._queue.empty()):
                    await self._write(await self._next())
            finally:
                pump.cancel()
        await self._response.write_eof()

    def end(self) -> None:
        if self._pump is not None:
            self._pump.cancel()

    async def _fill(self, events: AsyncGenerator[Event, None]) -> None:
        try:
            async with aclosing(events):
                async for event in events:
                    await self._queue.put(_encoded(event))
        except Exception as error:  # noqa: BLE001 - a boundary: the status is sent, words are left
            await self._queue.put(_encoded(Event(PROBLEM, told(error, "a stream"))))
        finally:
            # Wakes a writer that waits; one that does not finds the pump done.
            if self._queue.empty():
                self._queue.put_nowait(b"")

    async def _next(self) -> bytes:
        """Everything that waits, in one piece; a comment when nothing came for long."""
        try:
            async with asyncio.timeout(self._keep_alive_s):
                chunks = [await self._queue.get()]
        except TimeoutError:
            return _KEEP_ALIVE
        while not self._queue.empty():
            chunks.append(self._queue.get_nowait())
        return b"".join(chunks)

    async def _write(self, chunk: bytes) -> None:
        async with asyncio.timeout(WRITE_DEADLINE_S):
            await self._response.write(chunk)


def _encoded(event: Event) -> bytes:
    at = f"id: {event.id}\n".encode() if event.id else b""
    return b"event: %b\n%bdata: %b\n\n" % (
        event.name.encode(),
        at,
        msgspec.json.encode(event.data),
    )
