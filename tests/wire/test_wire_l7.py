"""L7 rules as a manifest has them are on the wire as they were: absent, empty, and given."""

from __future__ import annotations

import pytest

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import Clause, Direction, RuleId
from services.policy.compile import PortAnswer, Verdict, compile_direction
from services.policy.features import Features
from services.policy.parse import parse_object
from services.policy.resolve import Resolver, ResolverSettings
from services.wire import convert

WEB = NumericIdentity(1001)
HTTP = "http"


def local(rules: object) -> tuple[Resolver, list[Clause]]:
    """Of a policy with these `rules` at TCP 80, or without the field."""
    entry: dict[str, object] = {"ports": [{"port": "80", "protocol": "TCP"}]}
    if rules is not ...:
        entry["rules"] = rules
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"endpointSelector": {}, "ingress": [{"toPorts": [entry]}]},
    }
    policy, problems = parse_object(document, "test", "shop", Features.ALL)
    assert policy is not None, problems
    resolver = Resolver(ResolverSettings(allow_localhost=False))
    resolver.set_identities({WEB: Labels.parse(["k8s:io.kubernetes.pod.namespace=shop"])})
    resolver.set_policy(policy, RuleId(16))
    return resolver, list(resolver.local_policy(WEB).clauses)


def answer(resolver: Resolver, *, over_the_wire: bool) -> PortAnswer:
    policy = resolver.local_policy(WEB)
    if over_the_wire:
        policy = convert.local_policy_from_wire(convert.local_policy_to_wire(policy))
    compiled = compile_direction(policy, Direction.INGRESS)
    assert compiled is not None
    return compiled.default.lookup(6, 80)


@pytest.mark.parametrize(
    ("rules", "parser", "texts"),
    [
        (..., None, ()),
        ({}, None, ()),
        ({"http": []}, None, ()),
        ({"http": [{}]}, HTTP, ("{}",)),
        ({"http": [{"method": "GET"}]}, HTTP, ('{"method":"GET"}',)),
        ({"l7proto": "redis", "l7": [{"cmd": "get"}]}, "redis", ('{"cmd":"get"}',)),
    ],
)
def test_absent_empty_and_given_stay_apart(
    rules: object, parser: str | None, texts: tuple[str, ...]
) -> None:
    resolver, (clause,) = local(rules)
    received = convert.clause_from_wire(convert.clause_to_wire(clause))
    assert received == clause
    proxy = received.proxy
    assert (None if proxy is None else (proxy.parser, proxy.rules)) == (
        None if parser is None else (parser, texts)
    )
    here, there = (answer(resolver, over_the_wire=far) for far in (False, True))
    assert here == there
    assert here.proxy.digest == there.proxy.digest
    assert here.verdict is (Verdict.ALLOW if parser is None else Verdict.REDIRECT)


def test_the_same_rules_have_the_same_digest_wherever_they_stand() -> None:
    one = {"http": [{"method": "GET", "path": "/"}, {"method": "PUT"}]}
    other = {"http": [{"method": "PUT"}, {"path": "/", "method": "GET"}]}
    digests = {
        clause.proxy.digest
        for rules in (one, other)
        for clause in local(rules)[1]
        if clause.proxy is not None
    }
    assert len(digests) == 1
