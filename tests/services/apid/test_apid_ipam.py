"""/v1/ipam on a real ipamd."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp.test_utils import TestClient, TestServer
from tessera_wire.ipam.v1 import ipam_pb2 as pb
from tessera_wire.ipam.v1.ipam_pb2_grpc import IpamServiceStub

from services.apid.app import application
from services.apid.backends import connected
from services.apid.routes import table
from services.runtime.config import ApidConfig
from services.wire.client import call, channel
from tests.fakes.served_ipamd import service


class Door:
    def __init__(self, client: TestClient[Any, Any], stub: IpamServiceStub) -> None:
        self.client = client
        self.stub = stub

    async def ask(
        self, method: str, path: str, status: int = 200, body: object = None, if_match: str = ""
    ) -> Any:
        headers = {"If-Match": f'"{if_match}"'} if if_match else {}
        if body is not None:
            headers["Content-Type"] = "application/json"
        data = msgspec.json.encode(body) if body is not None else None
        async with self.client.request(method, path, data=data, headers=headers) as response:
            answer = await response.read()
            assert response.status == status, answer
            self.etag = response.headers.get("ETag", "").strip('"')
            return msgspec.json.decode(answer)

    async def allocate(self, name: str, node: str = "n1") -> list[str]:
        owner = pb.Owner(namespace="shop", name=name, interface="eth0", uid="u")
        request = pb.AllocateRequest(node=node, owner=owner)
        answer = await call(self.stub.Allocate, request, deadline_s=5)
        return [address.ip for address in answer.addresses]


@pytest.fixture
async def door(tmp_path: Path) -> AsyncIterator[Door]:
    async with service(tmp_path) as ipamd, channel(ipamd.target) as dialled:
        away = f"unix://{tmp_path}/away.sock"
        config = ApidConfig(identityd=away, ipamd=ipamd.target, policyd=away)
        async with (
            connected(config) as backends,
            TestClient(TestServer(application(table(backends)))) as client,
        ):
            yield Door(client, IpamServiceStub(dialled))


SPEC = {"cidrs": ["10.50.0.0/24"], "namespaces": ["blue"]}


async def test_a_pool_from_creation_to_deletion(door: Door) -> None:
    path = "/v1/ipam/pools/blue"
    assert (await door.ask("PUT", path + "?create=true", body=SPEC))["action"] == "created"
    await door.ask("PUT", path + "?create=true", 409, SPEC)
    found = await door.ask("GET", path)
    first = door.etag
    assert found["spec"]["namespaces"] == ["blue"]
    assert found["usage"][0]["capacity"] == 254
    wider = {**SPEC, "cidrs": ["10.50.0.0/23"]}
    dry = await door.ask("PUT", path + "?dry_run=true", body=wider, if_match=first)
    assert dry["action"] == "changed"
    assert (await door.ask("PUT", path, body=wider, if_match=first))["action"] == "changed"
    await door.ask("PUT", path, 412, SPEC, first)
    await door.ask("DELETE", path, 412, if_match=first)
    assert await door.ask("DELETE", path) == {"blocks": 0}
    await door.ask("GET", path, 404)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        ({"cidrs": []}, 422, "at least one CIDR"),
        ({"cidrs": ["10.0.0.0/25"]}, 422, "overlaps 10.0.0.0/24 of pool default"),
        ({"cidrs": ["10.9.0.1/24"]}, 422, "did you mean 10.9.0.0/24"),
        ({"cidrs": ["10.9.0.0/24"], "colour": "red"}, 400, "unknown field `colour`"),
        ([], 400, "Expected `object`"),
    ],
)
async def test_a_pool_that_cannot_be_is_refused_in_words(
    door: Door, body: object, status: int, words: str
) -> None:
    refused = await door.ask("PUT", "/v1/ipam/pools/blue", status, body)
    assert words in refused["detail"]


async def test_who_has_an_address_and_its_release_by_hand(door: Door) -> None:
    four, six = await door.allocate("web")
    found = await door.ask("GET", f"/v1/ipam/addresses/{four}")
    assert (found["owner"]["name"], found["node"]) == ("web", "n1")
    seen = door.etag
    assert (await door.ask("GET", f"/v1/ipam/addresses/{six}"))["owner"]["name"] == "web"
    await door.ask("DELETE", f"/v1/ipam/addresses/{four}", 412, if_match="1")
    gone = await door.ask("DELETE", f"/v1/ipam/addresses/{four}", if_match=seen)
    assert {address["ip"] for address in gone["released"]} == {four, six}
    await door.ask("DELETE", f"/v1/ipam/addresses/{four}", 404)
    await door.ask("GET", "/v1/ipam/addresses/web", 422)


async def test_what_its_node_says_is_in_use_is_released_by_force_only(door: Door) -> None:
    four, six = await door.allocate("web")
    owner = pb.Owner(namespace="shop", name="web", interface="eth0", uid="u")
    held = [pb.Held(owner=owner, ips=[four, six])]
    report = pb.ReportInventoryRequest(node="n1", held=held)
    await call(door.stub.ReportInventory, report, deadline_s=5)
    refused = await door.ask("DELETE", f"/v1/ipam/addresses/{four}", 409)
    assert "in use: node n1 has endpoint shop/web" in refused["detail"]
    await door.ask("DELETE", f"/v1/ipam/addresses/{four}?force=true")


async def test_addresses_are_listed_by_owner_node_and_pool_page_by_page(door: Door) -> None:
    for n in range(6):
        await door.allocate(f"w{n}", f"n{n % 2}")
    path, seen = "/v1/ipam/addresses?node=n0&limit=2", []
    while path:
        page = await door.ask("GET", path)
        assert len(page["addresses"]) <= 2
        seen += [address["owner"]["name"] for address in page["addresses"]]
        following = page["next"]
        path = f"/v1/ipam/addresses?node=n0&limit=2&cursor={following}" if following else ""
    assert sorted(seen) == ["w0", "w0", "w2", "w2", "w4", "w4"]
    mine = await door.ask("GET", "/v1/ipam/addresses?owner=shop/w3")
    assert len(mine["addresses"]) == 2
    await door.ask("GET", "/v1/ipam/addresses?pool=none", 404)


async def test_a_leak_is_told_before_it_is_released(door: Door) -> None:
    await door.allocate("web")
    report = pb.ReportInventoryRequest(node="n1")
    await call(door.stub.ReportInventory, report, deadline_s=5)
    leaks = (await door.ask("GET", "/v1/ipam/leaks"))["leaks"]
    assert [leak["reason"] for leak in leaks] == ["node n1 does not know the owner"] * 2
    await call(door.stub.ReportInventory, report, deadline_s=5)
    assert (await door.ask("GET", "/v1/ipam/leaks"))["leaks"] == []
    assert (await door.ask("GET", "/v1/ipam/addresses"))["addresses"] == []


async def test_a_node_that_will_not_come_back_is_released(door: Door) -> None:
    await door.allocate("web", "gone")
    assert await door.ask("DELETE", "/v1/ipam/nodes/gone") == {"addresses": 2, "blocks": 2}
    await door.ask("DELETE", "/v1/ipam/nodes/gone", 404)
    assert (await door.ask("GET", "/v1/ipam/blocks"))["blocks"] == []
