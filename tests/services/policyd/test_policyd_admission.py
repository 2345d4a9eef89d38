"""Policies that would do harm are refused before they are stored, with the numbers."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.policy.features import Features
from services.policy.parse import ParsedPolicy, parse
from services.policy.resolve import Resolver, ResolverSettings
from services.policyd.admission import Limits, Protected, objections
from services.policyd.state import State
from services.runtime.clock import SystemClock
from services.runtime.config import PolicydConfig
from services.runtime.errors import Invalid
from services.store.memory import MemoryStore
from services.store.model import Changed, KeyValue, Revision, Synced
from tests.fakes import cluster_keys as keys
from tests.fakes.running_policyd import running_policyd

API, WEB = 1002, 1001
PEERS = range(2000, 2600)
SMALL = Limits(peer_rows=1024)


def state(*items: tuple[str, bytes]) -> State:
    made = State(Resolver(ResolverSettings(allow_localhost=False)))
    content = [
        keys.node("n1"),
        keys.identity(API, keys.pod("api")),
        keys.identity(WEB, keys.pod("web")),
        keys.address("10.2.0.1", API),
        keys.address("10.2.0.2", WEB),
        *(keys.identity(n, keys.pod("peer", instance=f"i{n}")) for n in PEERS),
        *items,
    ]
    events = [Changed(KeyValue(k, v, Revision(1), Revision(1), 1)) for k, v in content]
    made.apply([*events, Synced(Revision(1))])
    return made


def parsed(*manifests: str) -> list[ParsedPolicy]:
    found = parse("---\n".join(manifests).encode(), "test", "default")
    assert not found.refused, found.problems
    return list(found.policies)


def http(name: str, kind: str) -> str:
    rules = {"http": "http: [{method: GET}]", "dns": 'dns: [{matchName: "a.example"}]'}[kind]
    return f"""\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {{name: {name}, namespace: shop}}
spec:
  endpointSelector: {{matchLabels: {{app: api}}}}
  egress:
  - toEndpoints: [{{matchLabels: {{app: web}}}}]
    toPorts: [{{ports: [{{port: "53", protocol: TCP}}], rules: {{{rules}}}}}]
"""


def test_a_policy_that_overflows_a_nodes_map_is_refused_with_the_numbers() -> None:
    one = state(keys.policy(keys.allow("web", "web", "peer"), 16))
    assert objections(one, parsed(keys.allow("api", "api", "web")), SMALL) == []
    (found,) = objections(one, parsed(keys.allow("api", "api", "peer")), SMALL)
    assert found.ref == keys.ref("api")
    assert found.message.startswith("node n1 would need 1202 rows of policy_peer and has 1024")


def test_policies_that_overflow_it_together_are_refused_together() -> None:
    two = parsed(keys.allow("api", "api", "peer"), keys.allow("web", "web", "peer"))
    assert objections(state(), two[:1], SMALL) == []
    assert {p.ref for p in objections(state(), two, SMALL)} == {keys.ref("api"), keys.ref("web")}


def test_what_overflows_already_may_be_mended_step_by_step() -> None:
    full = state(
        keys.policy(keys.allow("web", "web", "peer"), 16),
        keys.policy(keys.allow("api", "api", "peer"), 20),
        keys.policy(keys.allow("more", "api", "web"), 24),
    )
    assert objections(full, parsed(keys.allow("api", "api", "web")), SMALL) == []
    assert objections(full, parsed(keys.allow("more", "api", "nobody")), SMALL) == []


def test_parsers_that_meet_on_an_endpoint_are_refused() -> None:
    both = [
        parse(http(name, kind).encode(), "test", "default", Features.L7).policies[0]
        for name, kind in (("one", "http"), ("two", "dns"))
    ]
    assert objections(state(), both[:1], SMALL) == []
    assert objections(state(), both[1:], SMALL) == []
    found = objections(state(), both, SMALL)
    assert {p.ref for p in found} == {keys.ref("one"), keys.ref("two")}
    assert "conflicting L7 parsers" in found[0].message


def test_what_nodes_must_reach_is_not_cut_off() -> None:
    limits = Limits(1 << 20, (Protected.parse("app=api 2379/TCP"),))
    (found,) = objections(state(), parsed(keys.allow("api", "api", "web")), limits)
    assert "cut nodes off from app=api 2379/TCP" in found.message
    assert objections(state(), parsed(keys.allow("web", "web", "api")), limits) == []
    nodes = keys.allow("api", "api", "web").replace(
        "- fromEndpoints", "- fromEntities: [host, remote-node]\n  - fromEndpoints"
    )
    assert objections(state(), parsed(nodes), limits) == []


@pytest.mark.parametrize("text", ["app=api", "2379/TCP", "app=api 2379", "a b c 1/TCP x"])
def test_a_protected_thing_that_is_none_is_refused_by_name(text: str) -> None:
    with pytest.raises(Invalid, match="protected"):
        Protected.parse(text)


def test_a_trial_leaves_no_trace() -> None:
    held = keys.policy(keys.to_cidr("api", "api", "10.0.0.0/8", but="10.1.0.0/16"), 16)
    tried = parsed(keys.to_cidr("api", "api", "10.0.0.0/9"), keys.allow("web", "web", "peer"))
    touched, untouched = state(held), state(held)
    objections(touched, tried, SMALL)
    for identity in (API, WEB):
        mine, theirs = (s.resolver.local_policy(identity) for s in (touched, untouched))
        assert mine == theirs
        for clause in mine.clauses:
            for group in clause.groups:
                assert touched.resolver.group(group) == untouched.resolver.group(group)


async def test_nothing_of_a_refused_request_is_stored(tmp_path: Path) -> None:
    config = PolicydConfig(protected=("app=api 2379/TCP",))
    async with (
        MemoryStore(SystemClock()) as store,
        running_policyd(store, tmp_path, config) as policyd,
    ):
        await policyd.put(keys.identity(API, keys.pod("api")))
        for dry_run in (True, False):
            answer = await policyd.apply(keys.allow("api", "api", "web"), dry_run=dry_run)
            assert [p.severity for p in answer.problems] == ["error"]
            assert answer.revision == 0
        assert (await policyd.list()).policies == []
