"""Nothing that can be written makes reading raise, hang, or grow beyond the text."""

from __future__ import annotations

import copy
import json
import tracemalloc
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import Direction, RuleId
from services.policy.compile import compile_direction
from services.policy.conflicts import conflict
from services.policy.features import Features
from services.policy.parse import parse, parse_object
from services.policy.reader import MAX_PROBLEMS
from services.policy.resolve import Resolver, ResolverSettings
from services.policy.tree import MAX_BYTES

CILIUM = {
    "apiVersion": "cilium.io/v2",
    "kind": "CiliumNetworkPolicy",
    "metadata": {"name": "web", "namespace": "shop"},
    "spec": {
        "endpointSelector": {
            "matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "tier", "operator": "In", "values": ["a", "b"]}],
        },
        "enableDefaultDeny": {"ingress": True},
        "ingress": [
            {
                "fromEndpoints": [{"matchLabels": {"app": "front"}}],
                "authentication": {"mode": "required"},
                "toPorts": [
                    {
                        "ports": [{"port": "80", "endPort": 90, "protocol": "TCP"}],
                        "rules": {"http": [{"path": "/a.*", "headers": ["X: 1"]}]},
                    },
                    {
                        "ports": [{"port": "https", "protocol": "TCP"}],
                        "serverNames": ["a.example.com"],
                        "terminatingTLS": {"secret": {"name": "s"}},
                    },
                ],
            },
            {"fromCIDRSet": [{"cidr": "10.0.0.0/8", "except": ["10.1.0.0/16"]}]},
            {"icmps": [{"fields": [{"type": "EchoRequest", "family": "IPv4"}]}]},
        ],
        "egress": [
            {"toFQDNs": [{"matchName": "example.com"}, {"matchPattern": "*.example.com"}]},
            {"toServices": [{"k8sService": {"serviceName": "s", "namespace": "n"}}]},
            {"toEntities": ["world"], "toPorts": [{"ports": [{"port": "0"}]}]},
            {
                "toEndpoints": [{}],
                "toPorts": [
                    {"ports": [{"port": "53"}], "rules": {"dns": [{"matchPattern": "*"}]}},
                    {
                        "ports": [{"port": "443", "protocol": "TCP"}],
                        "listener": {"envoyConfig": {"name": "c"}, "name": "l", "priority": 5},
                    },
                ],
            },
        ],
        "egressDeny": [{"toRequires": [{"matchLabels": {"env": "x"}}], "toCIDR": ["::/0"]}],
    },
}
KUBERNETES = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "np"},
    "spec": {
        "podSelector": {},
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"namespaceSelector": {}, "podSelector": {}}], "ports": [{}]}],
        "egress": [{"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [{"port": 80}]}],
    },
}
CLUSTER = {
    "apiVersion": "policy.networking.k8s.io/v1alpha2",
    "kind": "ClusterNetworkPolicy",
    "metadata": {"name": "cnp"},
    "spec": {
        "tier": "Admin",
        "priority": 3,
        "subject": {"pods": {"namespaceSelector": {}, "podSelector": {}}},
        "egress": [
            {
                "action": "Accept",
                "to": [{"networks": ["10.0.0.0/8"]}, {"nodes": {}}, {"domainNames": ["*.a.b"]}],
                "protocols": [{"tcp": {"destinationPort": {"range": {"start": 1, "end": 9}}}}],
            }
        ],
    },
}
words = st.sampled_from(
    ["", "0", "-1", "65536", "http", "*", "a" * 300, "10.0.0.0/8", "::/0", "TCP", "(", "a{9}", "é"]
)
values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(words, inner, max_size=3)),
    max_leaves=6,
)


def places(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [at] if at else []
    children = (
        node.items()
        if isinstance(node, dict)
        else enumerate(node)
        if isinstance(node, list)
        else ()
    )
    for key, child in children:
        found += places(child, (*at, key))
    return found


@st.composite
def damaged(draw):
    document = copy.deepcopy(draw(st.sampled_from([CILIUM, KUBERNETES, CLUSTER])))
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from(places(document)))
        node: Any = document
        for key in path:
            node = node[key]
        if draw(st.booleans()) and isinstance(node, dict):
            node[draw(words)] = node.pop(last)
        else:
            node[last] = draw(values)
    return document


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(damaged(), st.sampled_from([Features.NODE, Features.ALL]))
def test_a_damaged_policy_is_refused_or_can_be_enforced(document, features):
    policy, problems = parse_object(document, "fuzz", "default", features)
    assert policy is not None or any(problem.severity == "error" for problem in problems)
    if policy is None:
        return
    resolver = Resolver(ResolverSettings())
    web = NumericIdentity(1000)
    labels = ["k8s:app=web", "k8s:tier=a", "k8s:io.kubernetes.pod.namespace=shop"]
    resolver.set_identities({web: Labels.parse(labels)})
    resolver.set_policy(policy, RuleId(16))
    local = resolver.local_policy(web)
    assert isinstance(conflict(local), str)
    for direction in Direction:
        compiled = compile_direction(local, direction)
        if compiled is not None:
            compiled.partition(lambda group: resolver.group(group).members)


@settings(max_examples=200, deadline=None)
@given(damaged())
def test_text_and_object_of_a_policy_read_alike(document):
    text = parse(json.dumps(document).encode(), "fuzz", "default", Features.ALL)
    policy, problems = parse_object(
        json.loads(json.dumps(document)), "fuzz", "default", Features.ALL
    )
    if "\\ud" in json.dumps(document) or any("not valid YAML" in p.message for p in text.problems):
        return
    assert text.refused == (policy is None), (text.problems, problems)


@settings(max_examples=300, deadline=None)
@given(
    st.one_of(
        st.binary(max_size=200),
        st.text(max_size=200).map(lambda text: text.encode("utf-8", "replace")),
        st.text("-: \n\t{}[],&*!|>'\"%@#?ak1", max_size=300).map(str.encode),
    )
)
def test_any_bytes_are_answered_with_problems_or_policies(text):
    parsed = parse(text, "fuzz", "default", Features.ALL)
    assert parsed.problems or parsed.policies
    for problem in parsed.problems:
        assert problem.line >= 1
        assert problem.column >= 1


FLOOD = MAX_BYTES // 4
BOMBS = {
    "aliases": b"a: &a [x,x,x,x,x,x,x,x,x]\n"
    + b"".join(
        b"%c: &%c [%s]\n" % (98 + i, 98 + i, b",".join([b"*%c" % (97 + i)] * 9)) for i in range(20)
    ),
    "depth": b"[" * FLOOD,
    "blocks": b"- " * (FLOOD // 2),
    "keys": b"".join(b"k%d: 1\n" % n for n in range(FLOOD // 10)),
    "documents": b"--- a\n" * (FLOOD // 6),
    "scalar": b'"' + b"a" * FLOOD + b'"',
    "flow": b"[" + b"a: b," * (FLOOD // 5) + b"]",
    "anchors": b"".join(b"- &a%d x\n" % n for n in range(FLOOD // 12)),
    "entities": b"apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: a}\nspec:\n"
    b"  endpointSelector: {}\n  ingress:\n" + b"  - {fromEntities: [xx]}\n" * (FLOOD // 25),
    "too large": b"#" * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_costs_no_more_than_its_text(name):
    text = BOMBS[name]
    tracemalloc.start()
    try:
        parsed = parse(text, "bomb", "default", Features.ALL)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert parsed.refused
    assert peak < 4_000_000 + 400 * len(text)


def test_a_flood_of_problems_ends_reading_of_its_document():
    parsed = parse(BOMBS["entities"], "flood", "default", Features.ALL)
    assert len(parsed.problems) == MAX_PROBLEMS
