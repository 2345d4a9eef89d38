"""/v1/identities over a real identityd."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import ClientResponse
from aiohttp.test_utils import TestClient, TestServer

from services.apid.app import application
from services.apid.backends import connected
from services.apid.routes import table
from services.runtime.clock import SystemClock
from services.runtime.config import ApidConfig
from services.store.memory import MemoryStore
from tests.fakes.identity_replica import until
from tests.fakes.running_identityd import NODE, RunningIdentityd, running_identityd

Client = TestClient[Any, Any]
DEADLINE_S = 10.0


@pytest.fixture
async def identityd(tmp_path: Path) -> AsyncIterator[RunningIdentityd]:
    clock = SystemClock()
    async with (
        MemoryStore(clock) as store,
        running_identityd(store, clock, tmp_path) as running,
    ):
        yield running


@pytest.fixture
async def client(identityd: RunningIdentityd, tmp_path: Path) -> AsyncIterator[Client]:
    away = f"unix://{tmp_path}/away.sock"
    config = ApidConfig(identityd=identityd.target, ipamd=away, policyd=away)
    async with (
        connected(config) as backends,
        TestClient(TestServer(application(table(backends)))) as client,
    ):
        yield client


async def get(client: Client, path: str) -> Any:
    async with client.get(path) as response:
        assert response.status == 200, await response.text()
        return await response.json()


@asynccontextmanager
async def watching(
    client: Client, query: str, **headers: str
) -> AsyncIterator[tuple[ClientResponse, AsyncIterator[tuple[str, str, Any]]]]:
    async with client.get(f"/v1/identities/watch?{query}", headers=headers) as response:
        assert response.status == 200, await response.text()
        yield response, _events(response)


async def _events(response: ClientResponse) -> AsyncIterator[tuple[str, str, Any]]:
    """(name, id, data) of each."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            block = (await response.content.readuntil(b"\n\n")).decode()
            lines = dict(line.split(": ", 1) for line in block.strip().splitlines())
            if "event" in lines:
                data = msgspec.json.decode(lines["data"])
                yield lines["event"], lines.get("id", ""), data


async def test_a_list_is_of_one_revision_to_its_last_page(
    client: Client, identityd: RunningIdentityd
) -> None:
    was = sorted(await identityd.allocate(*(f"k8s:tier=a{i}" for i in range(5))))
    path = "/v1/identities?labels=tier&limit=2"
    page = await get(client, path)
    pages = [page]
    await identityd.remove(was[3])
    await identityd.allocate(*(f"k8s:tier=b{i}" for i in range(5)))
    while page["next"]:
        page = await get(client, f"{path}&cursor={page['next']}")
        pages.append(page)
    assert [one["id"] for page in pages for one in page["identities"]] == was
    assert {page["revision"] for page in pages} == {pages[0]["revision"]}


async def test_who_uses_an_identity_is_told_by_node_and_by_endpoint(
    client: Client, identityd: RunningIdentityd
) -> None:
    [number] = await identityd.allocate("k8s:tier=a")
    await identityd.announce(number, ("shop", "web-1", "10.0.0.1"), ("shop", "web-2", "10.0.0.2"))
    view = identityd.replica.view
    await until(lambda: view.nodes_of(number), "the reference")
    found = await get(client, f"/v1/identities/{number}/references")
    [reference] = found["references"]
    assert (reference["node"], reference["held"]) == (NODE, True)
    assert len(reference["endpoints"]) == 2
    page = await get(client, f"/v1/identities/{number}/endpoints?limit=1&fields=name,ip")
    assert page["endpoints"] == [{"name": "web-1", "ip": "10.0.0.1"}]
    path = f"/v1/identities/{number}/endpoints?limit=1&cursor={page['next']}"
    last = await get(client, path)
    assert ([one["name"] for one in last["endpoints"]], last["next"]) == (["web-2"], "")


async def test_what_is_announced_is_listed_with_its_identity(
    client: Client, identityd: RunningIdentityd
) -> None:
    web, db = await identityd.allocate("k8s:tier=a", "k8s:tier=b")
    await identityd.announce(web, ("shop", "web", "10.0.0.1"), ("bank", "web", "10.0.1.1"))
    await identityd.announce(db, ("shop", "db", "10.0.0.2"))

    async def names(query: str) -> list[tuple[str, int]]:
        found = (await get(client, f"/v1/endpoints?{query}"))["endpoints"]
        return [(f"{one['namespace']}/{one['name']}", one["identity"]) for one in found]

    every = [("shop/web", web), ("shop/db", db), ("bank/web", web)]
    assert await names("") == await names(f"node={NODE}") == every
    assert await names("endpoint=shop/db") == [("shop/db", db)]
    assert await names("endpoint=web") == [every[0], every[2]]
    assert await names("cidr=10.0.0.0/24") == every[:2]
    first = await get(client, "/v1/endpoints?limit=2")
    assert await names(f"limit=2&cursor={first['next']}") == every[2:]
    async with client.get("/v1/endpoints?node=a&cidr=::/0") as response:
        assert response.status == 400


async def test_the_numbers_left_and_what_they_go_to(
    client: Client, identityd: RunningIdentityd
) -> None:
    await identityd.allocate(*(f"k8s:tier=a{i}" for i in range(5)))
    stats = await get(client, "/v1/identities/stats")
    assert (stats["used"], stats["pressure"]) == (5, "none")
    usage = await get(client, "/v1/identities/usage?limit=1")
    assert [(one["key"], one["values"]) for one in usage["keys"]] == [("tier", 5)]
    rest = await get(client, f"/v1/identities/usage?limit=1&cursor={usage['next']}")
    assert [one["key"] for one in rest["keys"]] == ["io.cilium.k8s.policy.cluster"]


async def test_a_watch_lists_follows_and_resumes_by_the_last_event_id(
    client: Client, identityd: RunningIdentityd
) -> None:
    [here] = await identityd.allocate("k8s:tier=a")
    async with watching(client, "labels=tier") as (_, events):
        assert await anext(events) == (
            "listed",
            "",
            {
                "id": here,
                "labels": ["k8s:io.cilium.k8s.policy.cluster=default", "k8s:tier=a"],
                "scope": "cluster",
                "node": "",
            },
        )
        name, last, _ = await anext(events)
        assert name == "synced"
        [first] = await identityd.allocate("k8s:tier=b")
        name, at, change = await anext(events)
        assert (name, change["id"]) == ("created", first)
        assert int(at) > int(last)
    [second] = await identityd.allocate("k8s:tier=c")
    async with watching(client, "labels=tier", **{"Last-Event-ID": at}) as (_, events):
        seen = [await anext(events) for _ in range(2)]
    assert [(name, body.get("id")) for name, _, body in seen] == [
        ("bookmark", None),
        ("created", second),
    ]


async def test_changes_of_one_transaction_share_one_place_to_resume(
    client: Client, identityd: RunningIdentityd
) -> None:
    async with watching(client, "labels=tier") as (_, events):
        while (await anext(events))[0] != "synced":
            pass
        await identityd.allocate(*(f"k8s:tier=a{i}" for i in range(20)))
        created = [await anext(events) for _ in range(20)]
    ids = [at for _, at, _ in created]
    assert ids[-1]
    assert {name for name, _, _ in created} == {"created"}
    # Resuming at any id seen loses nothing: an id stands behind the last change of its revision.
    assert ids.count("") == 20 - len(set(ids) - {""})


@pytest.mark.parametrize("last", ["x", "-1", "1" * 40])
async def test_an_id_that_the_stream_never_gave_is_refused(client: Client, last: str) -> None:
    headers = {"Last-Event-ID": last}
    async with client.get("/v1/identities/watch", headers=headers) as response:
        assert response.status == 400
        assert (await response.json(content_type=None))["type"].endswith(":bad-header")


async def test_a_watch_of_a_bad_selector_is_refused_before_it_begins(client: Client) -> None:
    async with client.get("/v1/identities/watch?labels=((") as response:
        assert response.status == 422


# ------------------------------------------------------------------ label rules

RULES = "/v1/identities/rules"


async def put_rules(client: Client, body: dict[str, Any], **headers: str) -> tuple[int, Any]:
    async with client.put(RULES, json=body, headers=headers) as response:
        return response.status, await response.json(content_type=None)


async def test_label_rules_are_changed_by_who_has_seen_them(
    client: Client, identityd: RunningIdentityd
) -> None:
    async with client.get(RULES) as response:
        assert (await response.json())["revision"] == 0
        seen = {"If-Match": response.headers["ETag"]}
    status, rules = await put_rules(client, {"label_filter": ["!k8s:uid"]}, **seen)
    assert (status, rules["label_filter"]) == (200, ["!k8s:uid"])
    # They count at once: two workloads that differ by that label alone are one.
    one, other = await identityd.allocate_sets(
        ("k8s:app=web", "k8s:uid=1"), ("k8s:app=web", "k8s:uid=2")
    )
    assert one == other
    status, problem = await put_rules(client, {}, **seen)
    assert (status, problem["type"]) == (412, "urn:tessera:problem:precondition-failed")
    assert (await get(client, RULES))["label_filter"] == ["!k8s:uid"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"label_filter": ["!("]}, 422, "no regular expression"),
        ({"label_filter": "!k8s:uid"}, 400, "label_filter"),
        ({"labels": []}, 400, "labels"),
        ({"warn_values": 1}, 400, "warn_values"),
    ],
)
async def test_label_rules_that_cannot_be_are_refused(
    client: Client, body: dict[str, Any], status: int, says: str
) -> None:
    found, problem = await put_rules(client, body)
    assert found == status
    assert says in problem["detail"]
    assert (await get(client, RULES))["revision"] == 0
