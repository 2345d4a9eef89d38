"""Questions about policy over REST, with a real policyd."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp.test_utils import TestClient, TestServer

from services.apid.app import application
from services.apid.backends import connected
from services.apid.routes import table
from services.runtime.clock import SystemClock
from services.runtime.config import ApidConfig
from services.store.memory import MemoryStore
from tests.fakes import cluster_keys as keys
from tests.fakes.running_policyd import running_policyd

Client = TestClient[Any, Any]
WEB, API = 1001, 1002


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as policyd,
        connected(ApidConfig(policyd=policyd.target)) as backends,
        TestClient(TestServer(application(table(backends)))) as client,
    ):
        for number, app in ((WEB, "web"), (API, "api")):
            await policyd.put(keys.identity(number, keys.pod(app)))
            await policyd.put(keys.address(f"10.2.0.{number - 1000}", number, name=app))
        await policyd.apply(keys.allow("api", "api", "web"))
        yield client


async def get(client: Client, path: str, status: int = 200) -> Any:
    async with client.get(path) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def post(client: Client, body: object, status: int = 200) -> Any:
    headers = {"Content-Type": "application/json"}
    data = json.dumps(body).encode()
    async with client.post("/v1/policies/diff", data=data, headers=headers) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


async def test_why_is_told_for_both_ends(client: Client) -> None:
    told = await get(client, "/v1/policies/explain?source=shop/web&target=shop/api&port=9/UDP")
    egress, ingress = told["ends"]
    assert (told["verdict"], egress["verdict"], ingress["verdict"]) == ("deny", "allow", "deny")
    assert ingress["policies"] == [
        {"kind": "CiliumNetworkPolicy", "namespace": "shop", "name": "api"}
    ]
    assert ingress["misses"][0]["rule"]["clause"] == "ingress[0]"


@pytest.mark.parametrize(
    ("query", "status", "says"),
    [
        ("source=shop/nobody&target=shop/api&port=80", 404, "shop/nobody"),
        ("source=shop/web&target=shop/api&port=80/QUIC", 422, "80/QUIC"),
        ("source=shop/web&target=shop/api", 400, "port"),
    ],
)
async def test_what_cannot_be_asked_is_refused(
    client: Client, query: str, status: int, says: str
) -> None:
    assert says in (await get(client, f"/v1/policies/explain?{query}", status))["detail"]


async def test_candidates_are_compared_over_connections(client: Client) -> None:
    closed = keys.allow("api", "api", "nobody")
    connection = {"source": "shop/web", "target": "shop/api", "port": "80/TCP"}
    asked = {"manifests": [{"text": closed}], "connections": [connection]}
    found = await post(client, asked)
    assert (found["denied_count"], found["unchanged"]) == (1, 0)
    assert found["denied"][0].items() >= connection.items()
    assert "shop/api" in found["denied"][0]["reason"]


@pytest.mark.parametrize(
    ("asked", "status", "says"),
    [
        ({"manifests": [{"text": "kind: Nothing", "source": "x.yaml"}]}, 422, "x.yaml:1:1"),
        ({"manifests": "text"}, 400, "manifests"),
        ({"nonsense": 1}, 400, "nonsense"),
        ({"ports": ["eighty"]}, 422, "eighty"),
    ],
)
async def test_candidates_that_cannot_be_read_are_refused(
    client: Client, asked: object, status: int, says: str
) -> None:
    assert says in (await post(client, asked, status))["detail"]
