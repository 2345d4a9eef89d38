"""REST over a real policyd, and stand-ins for the other services."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import pytest
from aiohttp import ClientSession
from aiohttp.test_utils import TestClient, TestServer
from tessera_wire.identity.v1 import queries_pb2, queries_pb2_grpc
from tessera_wire.ipam.v1 import ipam_pb2, ipam_pb2_grpc

from services.apid.app import application
from services.apid.backends import connected
from services.apid.main import listening
from services.apid.rest.errors import MAX_BODY_BYTES
from services.apid.routes import table
from services.runtime.clock import SystemClock
from services.runtime.config import ApidConfig
from services.runtime.errors import Conflict, Exhausted, Invalid, NotFound, Unusable
from services.store.memory import MemoryStore
from services.wire.server import serve
from tests.fakes import cluster_keys as keys
from tests.fakes.policy_agent import policy_agent
from tests.fakes.running_policyd import Running, running_policyd

Client = TestClient[Any, Any]

API = 1002
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"


class FakeIdentities(queries_pb2_grpc.IdentityQueriesServicer):
    async def List(
        self, request: queries_pb2.ListRequest, context: object
    ) -> queries_pb2.ListResponse:
        if request.selector == "((":
            raise Invalid("selector '((': parentheses do not pair")
        if request.selector == "old" and request.revision:
            raise Conflict("the list of revision 9 can no longer be read")
        identity = queries_pb2.Identity(
            id=API,
            labels="k8s:app=api;",
            nodes=["n1"],
            scope="cluster",
        )
        return queries_pb2.ListResponse(identities=[identity], revision=9, more=True)

    async def Get(self, request: queries_pb2.GetRequest, context: object) -> queries_pb2.Identity:
        match request.id:
            case 409:
                raise Conflict("somebody was first")
            case 501:
                raise Unusable("no such feature here")
            case 507:
                raise Exhausted("no number is left")
            case 500:
                raise RuntimeError("a bug")
        raise NotFound(f"identity {request.id} does not exist")


class FakeIpam(ipam_pb2_grpc.IpamServiceServicer):
    async def ListPools(
        self, request: ipam_pb2.ListPoolsRequest, context: object
    ) -> ipam_pb2.ListPoolsResponse:
        pool = ipam_pb2.Pool(
            name="default",
            spec=ipam_pb2.PoolSpec(cidrs=["10.244.0.0/16"], block_size=26),
            usage=[ipam_pb2.Usage(family=4, capacity=65534, used=2)],
        )
        return ipam_pb2.ListPoolsResponse(pools=[pool])

    async def ListBlocks(
        self, request: ipam_pb2.ListBlocksRequest, context: object
    ) -> ipam_pb2.ListBlocksResponse:
        block = ipam_pb2.Block(cidr="10.244.0.0/26", node=request.node, used=2, size=64)
        return ipam_pb2.ListBlocksResponse(blocks=[block])

    async def ListAddresses(
        self, request: ipam_pb2.ListAddressesRequest, context: object
    ) -> ipam_pb2.ListAddressesResponse:
        owner = ipam_pb2.Owner(namespace="shop", name="api")
        address = ipam_pb2.Address(ip="10.244.0.1", pool=request.pool, owner=owner)
        return ipam_pb2.ListAddressesResponse(addresses=[address])


def register(server: grpc.aio.Server) -> None:
    queries_pb2_grpc.add_IdentityQueriesServicer_to_server(FakeIdentities(), server)
    ipam_pb2_grpc.add_IpamServiceServicer_to_server(FakeIpam(), server)


@asynccontextmanager
async def rest(config: ApidConfig) -> AsyncIterator[Client]:
    async with (
        connected(config) as backends,
        TestClient(TestServer(application(table(backends)))) as client,
    ):
        yield client


@pytest.fixture
async def policyd(tmp_path: Path) -> AsyncIterator[Running]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as running,
    ):
        yield running


@pytest.fixture
async def client(policyd: Running, tmp_path: Path) -> AsyncIterator[Client]:
    async with serve(f"unix://{tmp_path}/others.sock", register) as others:
        config = ApidConfig(identityd=others.target, ipamd=others.target, policyd=policyd.target)
        async with rest(config) as client:
            yield client


@pytest.fixture
async def alone(tmp_path: Path) -> AsyncIterator[Client]:
    """No backend runs."""
    away = f"unix://{tmp_path}/away.sock"
    async with rest(ApidConfig(identityd=away, ipamd=away, policyd=away)) as client:
        yield client


async def get(client: Client, path: str, status: int = 200) -> Any:
    return await ask(client, "GET", path, status=status)


async def ask(
    client: Client, method: str, path: str, body: bytes | str = b"", status: int = 200
) -> Any:
    body = body.encode() if isinstance(body, str) else body
    # As curl and http.client send it: without a type.
    async with client.request(
        method, path, data=BytesIO(body), skip_auto_headers=["Content-Type"]
    ) as response:
        answer = await response.read()
        assert response.status == status, answer
        kind = "application/json" if status == 200 else "application/problem+json"
        assert response.content_type == kind
        decoded = msgspec.json.decode(answer)
        if status != 200:
            assert decoded["status"] == status
            assert decoded["title"]
            assert "\n" not in decoded["detail"]
        return decoded


# ------------------------------------------------------------------ policies


async def test_a_policy_is_applied_listed_waited_for_and_deleted(
    client: Client, policyd: Running
) -> None:
    manifest = keys.allow("api", "api", "web")
    applied = await ask(client, "POST", "/v1/policies?author=ann&source=api.yaml", manifest)
    ref = {"kind": "CiliumNetworkPolicy", "namespace": "shop", "name": "api"}
    assert applied["policies"] == [{**ref, "action": "created"}]
    listed = await get(client, "/v1/policies?name=api")
    assert [(p["manifest"], p["author"], p["state"]) for p in listed["policies"]] == [
        (manifest, "ann", "enforced")
    ]
    revision = applied["revision"]
    async with policy_agent(policyd.target, "n1"):
        realised = await get(client, f"/v1/policies/wait?revision={revision}&timeout_s=5")
        assert realised["done"]
        assert [node["node"] for node in realised["nodes"]] == ["n1"]
        assert (await get(client, "/v1/nodes"))["nodes"][0]["connected"]
    deleted = await ask(client, "DELETE", "/v1/policies/CiliumNetworkPolicy/shop/api")
    assert deleted["policies"] == [{**ref, "action": "deleted"}]
    assert (await get(client, "/v1/policies"))["policies"] == []


async def test_a_refused_manifest_is_told_with_every_problem(client: Client) -> None:
    bad = keys.allow("bad", "api", "web").replace("ingress:", "ingres:")
    refusal = await ask(client, "POST", "/v1/policies?source=bad.yaml", bad, status=422)
    assert refusal["detail"].startswith("nothing was applied: bad.yaml:")
    (problem,) = [p for p in refusal["problems"] if p["severity"] == "error"]
    assert problem["line"] > 0
    assert problem["policy"]["name"] == "bad"
    assert (await get(client, "/v1/policies"))["policies"] == []


async def test_a_dry_run_is_told_as_such(client: Client) -> None:
    manifest = keys.allow("api", "api", "web")
    answer = await ask(client, "POST", "/v1/policies?dry_run=1", manifest)
    assert answer["revision"] == 0
    assert answer["policies"][0]["action"] == "created"
    assert (await get(client, "/v1/policies"))["policies"] == []


async def test_a_policy_without_a_namespace_is_deleted_by_an_underscore(client: Client) -> None:
    manifest = keys.allow("api", "api", "web").replace(", namespace: shop", "")
    manifest = manifest.replace("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy")
    await ask(client, "POST", "/v1/policies", manifest)
    path = "/v1/policies/CiliumClusterwideNetworkPolicy/_/api"
    await ask(client, "DELETE", path)
    missing = await ask(client, "DELETE", path, status=404)
    assert "policy CiliumClusterwideNetworkPolicy api does not exist" in missing["detail"]


async def test_documents_name_what_to_delete_even_if_they_are_not_good(client: Client) -> None:
    good = keys.allow("one", "api", "web") + "---\n" + keys.allow("two", "db", "api")
    await ask(client, "POST", "/v1/policies", good)
    bad = good.replace("ingress:", "ingres:")
    answer = await ask(client, "POST", "/v1/policies/delete", bad)
    assert [policy["name"] for policy in answer["policies"]] == ["one", "two"]


async def test_references_name_what_to_delete(client: Client) -> None:
    await ask(client, "POST", "/v1/policies", keys.allow("one", "api", "web"))
    refs = [
        {"kind": "CiliumNetworkPolicy", "namespace": "shop", "name": name}
        for name in ("one", "none")
    ]
    body = msgspec.json.encode({"refs": refs})
    answer = await ask(client, "POST", "/v1/policies/delete", body)
    assert [policy["name"] for policy in answer["policies"]] == ["one"]
    assert [ref["name"] for ref in answer["not_found"]] == ["none"]


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        (b'{"refs": [{"kind": "x"}]}', 400, "missing required field"),
        (b"{", 422, "request body:1:"),
        (b"", 422, "no policy in it"),
    ],
)
async def test_a_body_that_names_nothing_deletes_nothing(
    client: Client, body: bytes, status: int, says: str
) -> None:
    answer = await ask(client, "POST", "/v1/policies/delete", body, status=status)
    assert says in answer["detail"]


async def test_the_trace_of_the_request_is_continued(client: Client, policyd: Running) -> None:
    async with policy_agent(policyd.target, "n1") as agent:
        async with client.post(
            "/v1/policies",
            data=keys.allow("api", "api", "web"),
            headers={
                "content-type": "application/yaml",
                "traceparent": f"00-{TRACE_ID}-b7ad6b7169203331-01",
            },
        ) as response:
            applied = await response.json()
        view = await agent.reached(applied["revision"])
    assert [t.split("-")[1] for t in view.traceparents] == [TRACE_ID]


# ------------------------------------------------------------------ one policy, guarded

ONE = "/v1/policies/CiliumNetworkPolicy/shop/api"


async def sent(
    client: Client, method: str, body: str = "", path: str = ONE, **headers: str
) -> tuple[int, Any]:
    kind = {"Content-Type": "application/yaml"} if body else {}
    async with client.request(
        method, path, data=body or None, headers={**kind, **headers}
    ) as response:
        return response.status, await response.json(content_type=None)


async def etag(client: Client) -> str:
    async with client.get(ONE) as response:
        assert response.status == 200
        return response.headers["ETag"]


async def test_a_policy_is_made_once_and_changed_by_who_has_seen_it(client: Client) -> None:
    first, second = keys.allow("api", "api", "web"), keys.allow("api", "api", "db")
    new = {"If-None-Match": "*"}
    assert (await sent(client, "PUT", first, **new))[0] == 200
    status, problem = await sent(client, "PUT", second, **new)
    assert (status, problem["type"]) == (412, "urn:tessera:problem:precondition-failed")
    seen = await etag(client)
    status, applied = await sent(client, "PUT", second, **{"If-Match": seen})
    assert (status, applied["policies"][0]["action"]) == (200, "configured")
    status, problem = await sent(client, "PUT", first, **{"If-Match": seen})
    assert status == 412
    assert "read it again" in problem["detail"]
    assert (await get(client, ONE))["manifest"] == second


async def test_a_policy_is_deleted_by_who_has_seen_it(client: Client) -> None:
    assert (await sent(client, "PUT", keys.allow("api", "api", "web")))[0] == 200
    old = await etag(client)
    assert (await sent(client, "PUT", keys.allow("api", "api", "db")))[0] == 200
    assert (await sent(client, "DELETE", **{"If-Match": old}))[0] == 412
    assert (await sent(client, "DELETE", **{"If-Match": '"nobodys"'}))[0] == 412
    held = f'"x", {await etag(client)}'
    assert (await sent(client, "DELETE", **{"If-Match": held}))[0] == 200
    assert (await sent(client, "DELETE", **{"If-Match": held}))[0] == 412
    assert (await sent(client, "GET"))[0] == 404


async def test_what_only_looks_different_refuses_no_write(client: Client, policyd: Running) -> None:
    manifest = keys.allow("api", "api", "web")
    await sent(client, "PUT", manifest)
    seen = await etag(client)
    await policyd.policyd.view.reached(await policyd.put(keys.identity(API, keys.pod("api"))))
    async with client.get(ONE, headers={"If-None-Match": seen}) as response:
        assert (response.status, (await response.json())["selects"]) == (200, 1)
    assert (await sent(client, "DELETE", **{"If-Match": seen}))[0] == 200


async def test_a_body_must_describe_what_the_path_names(client: Client) -> None:
    status, problem = await sent(client, "PUT", keys.allow("other", "api", "web"))
    assert status == 422
    assert "the path names CiliumNetworkPolicy api, the body" in problem["detail"]
    assert (await get(client, "/v1/policies"))["policies"] == []


# ------------------------------------------------------------------ the other services


async def test_identities_are_listed_and_found(client: Client) -> None:
    path = "/v1/identities?labels=app%3Dapi&limit=3"
    first = await get(client, path)
    (found,) = first["identities"]
    assert found == {
        "id": API,
        "labels": ["k8s:app=api"],
        "nodes": ["n1"],
        "scope": "cluster",
        "addresses": 0,
    }
    second = await get(client, f"{path}&cursor={first['next']}")
    assert second["revision"] == first["revision"] == 9
    missing = await get(client, "/v1/identities/7", status=404)
    assert missing["detail"] == "identity 7 does not exist"
    await get(client, "/v1/identities/web", status=404)


@pytest.mark.parametrize("status", [409, 501, 507])
async def test_what_a_service_raises_has_one_status(client: Client, status: int) -> None:
    await get(client, f"/v1/identities/{status}", status=status)


async def test_a_bug_in_a_service_is_that_services_fault(client: Client) -> None:
    answer = await get(client, "/v1/identities/500", status=503)
    assert "identityd" in answer["detail"]


async def test_a_services_refusal_is_in_its_words(client: Client) -> None:
    answer = await get(client, "/v1/identities?labels=((", status=422)
    assert answer["detail"] == "selector '((': parentheses do not pair"


async def test_a_list_that_moved_on_too_far_is_gone(client: Client) -> None:
    first = await get(client, "/v1/identities?labels=old&limit=1")
    path = f"/v1/identities?labels=old&limit=1&cursor={first['next']}"
    gone = await get(client, path, status=410)
    assert gone["type"] == "urn:tessera:problem:cursor-expired"


async def test_addresses_are_passed_on(client: Client) -> None:
    (pool,) = (await get(client, "/v1/ipam/pools"))["pools"]
    assert pool["usage"][0]["capacity"] == 65534
    assert (await get(client, "/v1/ipam/blocks?node=n1"))["blocks"][0]["node"] == "n1"
    found = await get(client, "/v1/ipam/addresses?node=n1&pool=p")
    assert found["addresses"][0]["owner"]["name"] == "api"


async def test_status_tells_of_every_service(client: Client) -> None:
    status = await get(client, "/v1/status")
    assert status["services"] == {"identityd": "ok", "ipamd": "ok", "policyd": "ok"}
    assert status["policy"]["policies"] == 0


# ------------------------------------------------------------------ what is refused


@pytest.mark.parametrize(
    ("path", "service"),
    [
        ("/v1/identities", "identityd"),
        ("/v1/ipam/pools", "ipamd"),
        ("/v1/policies", "policyd"),
        ("/v1/nodes", "policyd"),
    ],
)
async def test_a_service_that_is_away_is_named(alone: Client, path: str, service: str) -> None:
    answer = await get(alone, path, status=503)
    assert answer["detail"].startswith(f"{service} at ")


async def test_status_and_health_answer_without_any_service(alone: Client) -> None:
    status = await get(alone, "/v1/status")
    assert status["policy"] is None
    assert "cannot be reached" in status["services"]["policyd"]
    assert (await get(alone, "/healthz"))["status"] == "ok"
    async with alone.get("/metrics") as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/v1/policies?kindd=x", "'kindd' of /v1/policies is unknown; known: "),
        ("/v1/status?x=1", "it takes none"),
        ("/v1/policies?kind=a&kind=b", "given twice"),
        ("/v1/identities?limit=-1", "limit"),
        ("/v1/identities?limit=many", "limit"),
        ("/v1/policies/wait", "revision"),
        ("/v1/policies/wait?revision=1&timeout_s=1e9", "timeout_s"),
    ],
)
async def test_a_query_that_is_not_understood_is_refused(
    client: Client, path: str, says: str
) -> None:
    answer = await get(client, path, status=400)
    assert says in answer["detail"]


async def test_unknown_paths_and_methods_are_problems_too(client: Client) -> None:
    assert "openapi.json" in (await get(client, "/v2/policies", status=404))["detail"]
    answer = await ask(client, "PUT", "/v1/policies", status=405)
    assert "GET" in answer["detail"]


async def test_a_body_too_large_is_refused_in_words(client: Client) -> None:
    body = b"#" * (MAX_BODY_BYTES + 1)
    answer = await ask(client, "POST", "/v1/policies", body, status=413)
    assert str(MAX_BODY_BYTES) in answer["detail"]


async def test_the_document_describes_every_route_and_resolves(client: Client) -> None:
    document = await get(client, "/v1/openapi.json")
    assert document["openapi"] == "3.1.0"
    async with connected(ApidConfig()) as backends:
        routes = {(route.method.lower(), route.path) for route in table(backends)}
    described = {(method, path) for path, on in document["paths"].items() for method in on}
    assert described == routes
    parameters = document["paths"]["/v1/policies/wait"]["get"]["parameters"]
    assert [(p["name"], p["required"]) for p in parameters if p["in"] == "query"] == [
        ("revision", True),
        ("timeout_s", False),
    ]
    defined = document["components"]["schemas"].keys()
    used = {text.split("/")[-1] for text in _references(document)}
    assert used <= defined


def _references(value: Any) -> set[str]:
    match value:
        case dict():
            own = {value["$ref"]} if "$ref" in value else set()
            return own.union(*map(_references, value.values()))
        case list():
            return set[str]().union(*map(_references, value))
        case _:
            return set()


# ------------------------------------------------------------------ listening


@pytest.mark.parametrize("listen", ["127.0.0.1:0", "unix:///{}/apid.sock"])
async def test_it_listens_where_it_is_told(tmp_path: Path, listen: str) -> None:
    config = ApidConfig()
    async with (
        connected(config) as backends,
        listening(application(table(backends)), listen.format(tmp_path)) as address,
    ):
        if address.startswith("unix:"):
            assert (tmp_path / "apid.sock").is_socket()
            return
        async with ClientSession() as session, session.get(f"{address}/healthz") as response:
            assert response.status == 200


async def test_an_address_in_use_is_named() -> None:
    async with connected(ApidConfig()) as backends:
        async with listening(application(table(backends)), "127.0.0.1:0") as address:
            taken = address.removeprefix("http://")
            with pytest.raises(Unusable, match=f"cannot listen on {taken}"):
                async with listening(application(table(backends)), taken):
                    pass
        with pytest.raises(Unusable, match="neither host:port nor"):
            async with listening(application(table(backends)), "nowhere"):
                pass
