"""Server-sent events: order, resumption, silence, slow and vanished clients, the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from aiohttp import ClientResponse, ClientSession, web
from aiohttp.test_utils import TestClient, TestServer

from services.apid.app import application
from services.apid.main import listening
from services.apid.rest import sse
from tests.fakes.rest_table import Orchard

Client = TestClient[Any, Any]
DEADLINE_S = 10.0


@pytest.fixture
def orchard() -> Orchard:
    return Orchard()


@pytest.fixture
async def client(orchard: Orchard) -> AsyncIterator[Client]:
    app = application(orchard.routes(), keep_alive_s=0.05)
    async with TestClient(TestServer(app)) as client:
        yield client


@asynccontextmanager
async def stream(client: Client, path: str, **headers: str) -> AsyncIterator[ClientResponse]:
    async with client.get(path, headers=headers) as response:
        assert response.status == 200
        assert response.content_type == "text/event-stream"
        assert response.headers["Cache-Control"] == "no-store"
        yield response


async def block(response: ClientResponse) -> str:
    """Up to the next empty line."""
    async with asyncio.timeout(DEADLINE_S):
        return (await response.content.readuntil(b"\n\n")).decode()


async def event(response: ClientResponse) -> str:
    while not (text := await block(response)).startswith("event:"):
        assert text.startswith((":", "retry:")), text
    return text


async def until(claim: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not claim():  # noqa: ASYNC110 - bounded, on real sockets
            await asyncio.sleep(0.01)


async def test_events_come_in_order_with_the_ids_to_resume_from(client: Client) -> None:
    async with stream(client, "/v1/ticks?upto=2") as response:
        assert (await block(response)).startswith("retry: ")
        assert await event(response) == 'event: tick\nid: 1\ndata: {"count":1}\n\n'
        assert await event(response) == 'event: tick\nid: 2\ndata: {"count":2}\n\n'


async def test_a_client_that_comes_back_gets_what_it_has_not_seen(
    client: Client, orchard: Orchard
) -> None:
    async with stream(client, "/v1/ticks?upto=5", **{"Last-Event-ID": "4"}) as response:
        assert 'data: {"count":5}' in await event(response)
    assert orchard.last_event_ids == ["4"]


async def test_silence_is_broken_by_comments(client: Client) -> None:
    async with stream(client, "/v1/ticks") as response:
        await block(response)
        assert [await block(response) for _ in range(2)] == [": keep-alive\n\n"] * 2


async def test_a_source_that_is_away_from_the_start_has_a_status(client: Client) -> None:
    async with client.get("/v1/ticks?fails=1") as response:
        assert response.status == 503
        assert (await response.json(content_type=None))["detail"].startswith("the clock is away")


async def test_a_source_that_fails_later_is_told_and_ends_the_stream(client: Client) -> None:
    async with stream(client, "/v1/ticks?upto=1&fails=1") as response:
        await event(response)
        last = await event(response)
        assert last.startswith("event: problem\n")
        assert "the clock stopped" in last
        assert await response.content.read() == b""


async def test_the_source_is_let_go_when_the_client_goes(client: Client, orchard: Orchard) -> None:
    async with stream(client, "/v1/ticks?upto=1") as response:
        await event(response)
        response.close()
        await until(lambda: orchard.closed == 1)


async def test_who_wants_something_else_than_events_is_refused(client: Client) -> None:
    async with client.get("/v1/ticks", headers={"Accept": "application/json"}) as response:
        assert response.status == 406


async def test_a_client_that_reads_nothing_holds_back_its_source_and_is_let_go(
    orchard: Orchard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sse, "WRITE_DEADLINE_S", 0.2)
    async with serving(orchard) as (address, _):
        reader, writer = await asyncio.open_connection(*address.removeprefix("http://").split(":"))
        writer.write(b"GET /v1/ticks?upto=4000000000 HTTP/1.1\r\nHost: x\r\n\r\n")
        await until(lambda: orchard.closed == 1)
        writer.close()
        got = await reader.read()
        assert b"event: tick" in got


async def test_shutting_down_ends_streams_cleanly_and_at_once(orchard: Orchard) -> None:
    async with ClientSession() as session:
        async with serving(orchard) as (address, _):
            response = await session.get(f"{address}/v1/ticks?upto=1")
            await event(response)
        # The body is complete: the last chunk has come, not a reset.
        assert await response.content.read() == b""
    assert orchard.closed == 1


@asynccontextmanager
async def serving(orchard: Orchard) -> AsyncIterator[tuple[str, web.Application]]:
    app = application(orchard.routes())
    async with asyncio.timeout(DEADLINE_S), listening(app, "127.0.0.1:0") as address:
        yield address, app
