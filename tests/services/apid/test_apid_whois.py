"""/v1/whois over a real identityd and a real policyd on one store; ipamd is away."""

from __future__ import annotations

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
from tests.fakes.running_identityd import HOST_IP, NODE, RunningIdentityd, running_identityd
from tests.fakes.running_policyd import Running, running_policyd

Client = TestClient[Any, Any]


@pytest.fixture
async def services(tmp_path: Path) -> AsyncIterator[tuple[RunningIdentityd, Running]]:
    clock = SystemClock()
    async with (
        MemoryStore(clock) as store,
        running_identityd(store, clock, tmp_path) as identityd,
        running_policyd(store, tmp_path) as policyd,
    ):
        yield identityd, policyd


@pytest.fixture
async def shop(services: tuple[RunningIdentityd, Running]) -> int:
    """The identity of shop/api at 10.0.0.7, which one policy selects for ingress."""
    identityd, policyd = services
    labels = ("k8s:app=api", "k8s:io.kubernetes.pod.namespace=shop")
    [number] = await identityd.allocate_sets(labels)
    await identityd.announce(number, ("shop", "api", "10.0.0.7"))
    applied = await policyd.apply(keys.allow("api", "api", "web"))
    await policyd.policyd.view.reached(applied.revision)
    return number


@pytest.fixture
async def client(
    services: tuple[RunningIdentityd, Running], tmp_path: Path
) -> AsyncIterator[Client]:
    identityd, policyd = services
    config = ApidConfig(
        identityd=identityd.target, ipamd=f"unix://{tmp_path}/away.sock", policyd=policyd.target
    )
    async with (
        connected(config) as backends,
        TestClient(TestServer(application(table(backends)))) as client,
    ):
        yield client


async def whois(client: Client, q: str, status: int = 200) -> Any:
    async with client.get("/v1/whois", params={"q": q}) as response:
        assert response.status == status, await response.text()
        return await response.json(content_type=None)


@pytest.mark.parametrize(
    ("q", "kind"),
    [
        ("10.0.0.7", "address"),
        ("10.0.0.0/24", "cidr"),
        ("shop/api", "endpoint"),
        ("api", "endpoint"),
        (NODE, "node"),
    ],
)
async def test_every_way_to_ask_leads_to_the_endpoint_and_its_policies(
    client: Client, shop: int, q: str, kind: str
) -> None:
    found = await whois(client, q)
    assert found["kind"] == kind
    assert found["says"]
    assert [(one["ip"], one["name"], one["node"]) for one in found["endpoints"]] == [
        ("10.0.0.7", "api", NODE)
    ]
    assert [one["id"] for one in found["identities"]] == [shop]
    [selected] = found["policies"]
    assert (selected["ingress_enforced"], selected["egress_enforced"]) == (True, False)
    assert [ref["name"] for ref in selected["ingress"]] == ["api"]


async def test_a_number_is_told_with_its_endpoints(client: Client, shop: int) -> None:
    found = await whois(client, str(shop))
    assert found["kind"] == "identity"
    assert f"identity {shop} (cluster): k8s:app=api" in found["says"][0]
    assert [one["name"] for one in found["endpoints"]] == ["api"]


async def test_a_service_that_is_away_is_told_and_the_rest_is_said(
    client: Client, shop: int
) -> None:
    found = await whois(client, "10.0.0.7")
    [missing] = found["unknown"]
    assert missing.startswith("ipamd at ")
    assert found["policies"]


async def test_addresses_that_no_endpoint_has(client: Client, shop: int) -> None:
    outside = await whois(client, "198.51.100.99")
    assert outside["says"] == ["to policies 198.51.100.99 is identity 2 (reserved:world)"]
    host = await whois(client, HOST_IP)
    assert f"{HOST_IP} is the address of node {NODE}" in host["says"]


async def test_a_reserved_name_is_its_identity(client: Client) -> None:
    assert [one["id"] for one in (await whois(client, "world"))["identities"]] == [2]


@pytest.mark.parametrize(
    ("q", "status", "says"),
    [
        ("bank/db", 404, "no endpoint 'bank/db' is announced"),
        ("nobody", 404, "is no node, endpoint or reserved name; ask for"),
        ("www.example.com", 404, "a DNS name has no identity"),
        ("255", 404, "not in use"),
        ("4294967296", 404, "32 bits"),
        ("16777216", 404, "local to one node"),
        ("", 400, "q"),
        ("web)=,(", 404, "is no node"),
    ],
)
async def test_who_nobody_is_is_told_with_what_to_ask_for(
    client: Client, q: str, status: int, says: str
) -> None:
    assert says in (await whois(client, q, status))["detail"]
