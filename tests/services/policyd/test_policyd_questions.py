"""Why, and what if, over real gRPC against the policies in force."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from tessera_wire.policy.v1 import policy_pb2 as pb
from tessera_wire.policy.v1 import policy_pb2_grpc

from services.runtime.clock import SystemClock
from services.runtime.errors import Invalid, NotFound
from services.store.memory import MemoryStore
from services.wire.client import call, channel
from tests.fakes import cluster_keys as keys
from tests.fakes.running_policyd import DEADLINE_S, Running, running_policyd

WEB, API, DB = 1001, 1002, 1003
TCP = 6
PORT = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: api, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: api}}
  ingress:
  - fromEndpoints: [{matchLabels: {app: web}}]
    toPorts: [{ports: [{port: "8080", protocol: TCP}]}]
"""
EVERY_PORT = PORT[: PORT.index("    toPorts")]
OUT = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: out, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  egress:
  - toCIDR: [198.51.100.0/24]
  - toEndpoints: [{matchLabels: {app: api}}]
"""


@pytest.fixture
async def policyd(tmp_path: Path) -> AsyncIterator[Running]:
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path) as running,
    ):
        await running.put(
            keys.node("n1"),
            *(keys.identity(n, keys.pod(app)) for n, app in ((WEB, "web"), (API, "api"))),
            keys.identity(DB, keys.pod("db")),
            *(keys.address(f"10.2.0.{n - 1000}", n, name=name)
              for n, name in ((WEB, "web-1"), (API, "api-1"), (DB, "db-1"))),
        )  # fmt: skip
        yield running


def manifests(text: str, source: str = "test.yaml") -> pb.Manifests:
    return pb.Manifests(text=text.encode(), source=source)


async def explain(policyd: Running, source: str, target: str, port: int) -> pb.ExplainResponse:
    connection = pb.Connection(source=source, target=target, proto=TCP, port=port)
    async with channel(policyd.target) as to:
        ask = policy_pb2_grpc.PolicyQuestionsStub(to).Explain
        return await call(ask, pb.ExplainRequest(connection=connection), deadline_s=DEADLINE_S)


async def diff(policyd: Running, request: pb.DiffRequest) -> pb.DiffResponse:
    async with channel(policyd.target) as to:
        ask = policy_pb2_grpc.PolicyQuestionsStub(to).Diff
        return await call(ask, request, deadline_s=DEADLINE_S)


def to_api(port: int, source: str = "shop/web-1") -> pb.Connection:
    return pb.Connection(source=source, target="shop/api-1", proto=TCP, port=port)


async def test_both_ends_name_the_clause_and_its_line(policyd: Running) -> None:
    await policyd.apply(PORT)
    await policyd.apply(OUT)
    answer = await explain(policyd, "shop/web-1", "shop/api-1", 8080)
    assert answer.verdict == "allow"
    egress, ingress = answer.ends
    assert (egress.identity, egress.peer, ingress.identity) == (WEB, API, API)
    assert [(r.policy.name, r.clause, r.line) for r in egress.rules] == [("out", "egress[1]", 8)]
    assert [(r.policy.name, r.clause, r.line) for r in ingress.rules] == [("api", "ingress[0]", 7)]


async def test_a_default_deny_names_its_policies_and_what_was_nearly_allowed(
    policyd: Running,
) -> None:
    await policyd.apply(PORT)
    for source in ("shop/web-1", "10.2.0.1", str(WEB)):
        answer = await explain(policyd, source, "shop/api-1", 8081)
        assert answer.verdict == "deny"
        ingress = answer.ends[1]
        assert ingress.reason == ("default deny: selected by CiliumNetworkPolicy shop/api")
        assert [policy.name for policy in ingress.policies] == ["api"]
        (miss,) = ingress.misses
        assert miss.lacks == "TCP port 8080 is allowed, you asked TCP port 8081"
        assert miss.rule.line == 7


async def test_an_end_that_is_no_endpoint_says_nothing(policyd: Running) -> None:
    await policyd.apply(OUT)
    answer = await explain(policyd, "shop/web-1", "198.51.100.7", 443)
    (egress,) = answer.ends
    assert (answer.verdict, egress.rules[0].line) == ("allow", 7)
    assert (await explain(policyd, "shop/web-1", "world", 443)).verdict == "deny"
    assert (await explain(policyd, "shop/web-1", "203.0.113.7", 443)).verdict == "deny"


async def test_a_nodes_own_host_is_let_in_and_a_deny_of_it_still_counts(policyd: Running) -> None:
    await policyd.apply(PORT)
    answer = await explain(policyd, "host", "shop/api-1", 1)
    assert answer.verdict == "allow"
    assert "allow_localhost" in answer.ends[0].reason
    await policyd.apply(
        PORT.replace("name: api,", "name: no-host,").replace(
            "  ingress:\n", "  ingressDeny: [{fromEntities: [host]}]\n  ingress:\n"
        )
    )
    assert (await explain(policyd, "host", "shop/api-1", 1)).verdict == "deny"


@pytest.mark.parametrize("name", ["shop/nobody", "nowhere", "4711", "10.0.0.0.0"])
async def test_an_end_that_nobody_knows_is_named(policyd: Running, name: str) -> None:
    with pytest.raises(NotFound, match=name.replace(".", "\\.")):
        await explain(policyd, name, "shop/api-1", 80)


async def test_candidates_are_compared_with_what_is_in_force(policyd: Running) -> None:
    await policyd.apply(EVERY_PORT)
    before = await policyd.list()
    request = pb.DiffRequest(
        manifests=[manifests(PORT), manifests(OUT)],
        connections=[
            to_api(8080),
            to_api(8081),
            to_api(8080, "shop/db-1"),
            pb.Connection(source="shop/web-1", target="203.0.113.7", proto=TCP, port=443),
            pb.Connection(source="shop/web-1", target="198.51.100.7", proto=TCP, port=443),
        ],
    )
    found = await diff(policyd, request)
    denied = [(c.connection.target, c.connection.port, c.reason) for c in found.denied]
    assert denied == [
        ("shop/api-1", 8081, "default deny: selected by CiliumNetworkPolicy shop/api"),
        ("203.0.113.7", 443, "default deny: selected by CiliumNetworkPolicy shop/out"),
    ]
    assert (found.denied_count, found.allowed_count, found.unchanged_count) == (2, 0, 3)
    assert (await policyd.list()) == before


async def test_a_deletion_is_a_candidate_too(policyd: Running) -> None:
    await policyd.apply(PORT)
    gone = pb.PolicyRef(kind="CiliumNetworkPolicy", namespace="shop", name="api")
    found = await diff(policyd, pb.DiffRequest(deleted=[gone], connections=[to_api(1)]))
    (allowed,) = found.allowed
    assert (allowed.before, allowed.after) == ("deny", "allow")
    assert allowed.reason == "open: nothing restricts it"


async def test_ports_ask_about_all_pairs_of_identities(policyd: Running) -> None:
    request = pb.DiffRequest(
        manifests=[manifests(PORT)], ports=[pb.PortQuestion(proto=TCP, port=8080)]
    )
    found = await diff(policyd, request)
    names = {(c.connection.source, c.connection.target) for c in found.denied}
    assert names == {(s, "shop/api-1") for s in ("shop/api-1", "shop/db-1", "world")}
    assert found.unchanged_count == 4 * 4 - 1 - 3


async def test_candidates_with_mistakes_are_refused_with_their_places(policyd: Running) -> None:
    broken = manifests(PORT.replace('"8080"', '"808000"'), "broken.yaml")
    request = pb.DiffRequest(manifests=[manifests(OUT), broken], connections=[to_api(1)])
    found = await diff(policyd, request)
    errors = [(p.source, p.line) for p in found.problems if p.severity == "error"]
    assert errors == [("broken.yaml", 8)]
    assert found.unchanged_count == 0


async def test_nothing_asked_and_too_much_asked_are_refused(policyd: Running) -> None:
    with pytest.raises(Invalid, match="no connection is asked about"):
        await diff(policyd, pb.DiffRequest(manifests=[manifests(PORT)]))
    with pytest.raises(Invalid, match="at most 100000"):
        await diff(policyd, pb.DiffRequest(connections=[to_api(1)] * 100_001))
