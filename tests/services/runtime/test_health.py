from __future__ import annotations

import socket

import aiohttp
import msgspec
import pytest

from services.runtime import metrics
from services.runtime.errors import Unusable
from services.runtime.health import OK, serve_metrics


async def fetch(address: str, path: str) -> tuple[int, str, bytes]:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://{address}{path}") as answer,
    ):
        return answer.status, answer.headers["Content-Type"], await answer.read()


async def test_health_is_ok_while_every_check_passes() -> None:
    checks = {"store": OK, "watch": OK}
    async with serve_metrics("127.0.0.1:0", lambda: checks) as address:
        status, _, body = await fetch(address, "/healthz")
        assert (status, msgspec.json.decode(body)) == (200, {"status": "ok", "checks": checks})
        checks["watch"] = "behind by 5 s"
        status, _, body = await fetch(address, "/healthz")
        assert (status, msgspec.json.decode(body)) == (503, {"status": "failing", "checks": checks})


async def test_metrics_are_prometheus_text() -> None:
    async with serve_metrics("127.0.0.1:0") as address:
        status, kind, body = await fetch(address, "/metrics")
    assert status == 200
    assert kind == metrics.CONTENT_TYPE
    assert b"# TYPE python_info gauge" in body


async def test_an_empty_address_serves_nothing() -> None:
    async with serve_metrics("") as address:
        assert address == ""


async def test_a_taken_or_senseless_address_is_unusable() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(Unusable, match=listen):
            async with serve_metrics(listen):
                pass
    with pytest.raises(Unusable, match="not host:port"):
        async with serve_metrics("here"):
            pass
