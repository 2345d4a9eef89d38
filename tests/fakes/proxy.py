"""A TCP proxy that a test can cut, or make swallow what it gets: the network between two parts."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self


class Proxy:
    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self._server: asyncio.Server | None = None
        self._port = 0
        self._open: set[asyncio.StreamWriter] = set()
        self._passing = asyncio.Event()
        self._passing.set()
        self.accepted = 0

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self._port}"

    async def cut(self) -> None:
        """Drop every connection and refuse new ones."""
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._open):
            writer.transport.abort()
        await self._server.wait_closed()

    async def restore(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        self._port = self._server.sockets[0].getsockname()[1]

    def swallow(self) -> None:
        """Accept and pass nothing on."""
        self._passing.clear()

    def release(self) -> None:
        self._passing.set()

    async def __aenter__(self) -> Self:
        await self.restore()
        return self

    async def __aexit__(self, *_exc: object) -> None:
        self.release()
        await self.cut()

    async def _serve(self, near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        self.accepted += 1
        self._open.add(near_out)
        far_out: asyncio.StreamWriter | None = None
        try:
            far_in, far_out = await asyncio.open_connection(*self._target)
            self._open.add(far_out)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(near_in, far_out))
                group.create_task(self._pump(far_in, near_out))
        except OSError:
            pass
        finally:
            for writer in (near_out, far_out):
                if writer is not None:
                    self._open.discard(writer)
                    writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                await self._passing.wait()
                sink.write(data)
                await sink.drain()
        sink.close()
