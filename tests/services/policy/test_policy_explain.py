"""Explanations: the clause that decided, who turned default deny on, what was almost allowed."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.blocks import Verdict
from services.policy.clauses import Direction, RuleId
from services.policy.diff import Connection, difference
from services.policy.explain import Asked, answer_of, explain, without
from services.policy.features import Features
from services.policy.parse import parse
from services.policy.questions import Ports
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.policy.stage import Stage, read_endpoints
from services.runtime.errors import Invalid, NotFound

ENDPOINTS = b"""
namespaces:
  shop: {team: red}
endpoints:
- {name: front, namespace: shop, labels: {app: front}, addresses: [10.0.0.1]}
- {name: web, namespace: shop, labels: {app: web}, named_ports: {TCP/http: 8080}}
- {name: db, namespace: shop, labels: {app: db}}
"""
POLICY = b"""apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {matchLabels: {app: web}}
  ingress:
  - fromEndpoints:
    - matchLabels: {app: front}
    toPorts:
    - ports: [{port: http, protocol: TCP}]
  ingressDeny:
  - fromEntities: [world]
"""


def policies(*texts):
    found = []
    for text in texts:
        parsed = parse(text, "file", "default", Features.ALL)
        assert not parsed.refused, parsed.problems
        found += [held.policy for held in parsed.policies]
    return found


def stage(*texts):
    return Stage(read_endpoints(ENDPOINTS, "endpoints"), policies(*texts))


def test_the_deciding_clause_is_named_with_its_line():
    egress, ingress = stage(POLICY).questions.explain("shop/front", "shop/web", Ports(6, 8080))
    assert egress.words == "open: nothing restricts it"
    assert ingress.passes
    assert ingress.words == ("allowed by CiliumNetworkPolicy shop/web rule 0 ingress[0] line 7")


def test_an_explicit_deny_is_told_from_default_deny():
    (denied,) = stage(POLICY).questions.explain("world", "shop/web", Ports(6, 8080))
    assert "ingressDeny[0] line 12" in denied.words
    assert not denied.misses
    _, default = stage(POLICY).questions.explain("shop/db", "shop/web", Ports(6, 8080))
    assert default.words == "default deny: selected by CiliumNetworkPolicy shop/web"


def test_a_near_miss_names_the_port_or_the_label():
    _, by_port = stage(POLICY).questions.explain("shop/front", "shop/web", Ports(6, 8081))
    assert by_port.misses[0].lacks == "TCP port 8080 is allowed, you asked TCP port 8081"
    _, by_label = stage(POLICY).questions.explain("shop/db", "shop/web", Ports(6, 8080))
    assert by_label.misses[0].lacks == "label app=front is missing"
    assert str(by_label.misses[0].source).endswith("ingress[0] line 7")


def test_names_addresses_and_reserved_words_choose_an_end():
    held = stage(POLICY)
    assert held.identity("10.0.0.1") == held.identity("shop/front")
    assert held.identity("192.0.2.7") == held.identity("world") == 2
    assert held.identity("host") == 1
    with pytest.raises(NotFound, match="shop/nobody"):
        held.identity("shop/nobody")


def test_a_difference_lists_what_is_newly_denied_and_newly_allowed():
    wider = POLICY.replace(b"app: front", b"app: db")
    asked = [
        Connection(source, "shop/web", Ports(6, port))
        for source in ("shop/front", "shop/db", "world")
        for port in (8080, 9090)
    ]
    found = difference(stage(POLICY).questions, stage(wider).questions, asked)
    assert [change.connection.source for change in found.denied] == ["shop/front"]
    assert [change.connection.source for change in found.allowed] == ["shop/db"]
    assert found.unchanged == 4


@pytest.mark.parametrize(
    "text",
    [
        b"endpoints: [{name: a}, {name: a}]",
        b"endpoints: [{name: a, colour: red}]",
        b"endpoints: [{name: a, addresses: [nowhere]}]",
        b"endpoints: [{name: a, named_ports: {http: 80}}]",
        b"endpoints: {",
        b"",
        b"\xff",
    ],
)
def test_a_broken_list_of_endpoints_is_refused(text):
    with pytest.raises(Invalid):
        Stage(read_endpoints(text, "endpoints"), [])


APPS = ("a", "b", "c")
PORTS = (79, 80, 81)
peer_lists = st.one_of(
    st.none(),
    st.lists(
        st.sampled_from(APPS).map(lambda app: {"matchLabels": {"app": app}}), min_size=1, max_size=2
    ),
)


@st.composite
def clauses(draw, *, deny):
    made = {}
    peers = draw(peer_lists)
    if peers is not None:
        made["fromEndpoints"] = peers
    ports = draw(st.lists(st.sampled_from(PORTS), max_size=2))
    if ports:
        entry = {"ports": [{"port": str(port), "protocol": "TCP"} for port in ports]}
        if not deny and draw(st.booleans()):
            entry["rules"] = {"http": [{"method": draw(st.sampled_from(["GET", "PUT"]))}]}
        made["toPorts"] = [entry]
    if not deny and draw(st.integers(0, 3)) == 0:
        modes = ["required", "disabled", "test-always-fail"]
        made["authentication"] = {"mode": draw(st.sampled_from(modes))}
    return made


@st.composite
def policy_texts(draw):
    spec = {
        "endpointSelector": draw(st.sampled_from([{}, {"matchLabels": {"app": "a"}}])),
        "ingress": draw(st.lists(clauses(deny=False), max_size=3)),
        "ingressDeny": draw(st.lists(clauses(deny=True), max_size=1)),
    }
    if draw(st.booleans()):
        spec["enableDefaultDeny"] = {"ingress": draw(st.booleans())}
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": spec,
    }
    return json.dumps(document).encode()


def filled(texts):
    resolver = Resolver(ResolverSettings())
    pods = {
        NumericIdentity(1000 + n): Labels.parse(
            [f"k8s:app={app}", "k8s:io.kubernetes.pod.namespace=shop"]
        )
        for n, app in enumerate(APPS)
    }
    resolver.set_identities(pods)
    base = 16
    for n, policy in enumerate(policies(*texts)):
        ref = replace(policy.ref, name=f"p{n}")
        resolver.set_policy(replace(policy, ref=ref), RuleId(base))
        base += rule_count(policy)
    return resolver


@settings(max_examples=150, deadline=None)
@given(
    st.lists(policy_texts(), max_size=3),
    st.sampled_from((1, 2, 1001, 1002)),
    st.sampled_from(PORTS),
)
def test_without_the_named_clauses_the_verdict_is_another_one(texts, peer, port):
    resolver = filled(texts)
    asked = Asked(Direction.INGRESS, NumericIdentity(1000), NumericIdentity(peer), 6, port)
    reason = explain(resolver, asked)
    local = resolver.local_policy(asked.subject)
    assert reason.answer == answer_of(resolver, local, asked, {})
    if reason.deciders:
        rest = without(local, [source.rule_id for source in reason.deciders])
        assert answer_of(resolver, rest, asked, {}).verdict is not reason.answer.verdict
    elif not reason.passes:
        assert reason.answer.verdict is Verdict.NONE
        assert reason.policies
    else:
        assert reason.answer.rule_id < 16
