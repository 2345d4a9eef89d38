"""CIDR groups: clauses follow them as they come, change and go."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.cidr_groups import CidrGroup, expanded
from services.policy.clauses import RuleId
from services.policy.features import Features
from services.policy.model import CidrGroupPeer
from services.policy.parse import Parsed, parse
from services.policy.resolve import Resolver, ResolverSettings

WEB = NumericIdentity(1001)
GROUP = """\
apiVersion: cilium.io/v2
kind: CiliumCIDRGroup
metadata: {name: partners, labels: {tier: outside}}
spec: {externalCIDRs: [192.0.2.0/25, 198.51.100.7/32]}
"""
POLICY = """\
apiVersion: cilium.io/v2
kind: CiliumNetworkPolicy
metadata: {name: web, namespace: shop}
spec:
  endpointSelector: {}
  ingress:
  - fromCIDRSet: [REF]
"""


def read(text: str, features: Features = Features.ALL) -> Parsed:
    return parse(text.encode(), "test", "shop", features)


def resolver(ref: str, *groups: CidrGroup) -> Resolver:
    made = Resolver(ResolverSettings(allow_localhost=False))
    made.set_identities({WEB: Labels.parse(["k8s:io.kubernetes.pod.namespace=shop"])})
    parsed = read(POLICY.replace("REF", ref))
    assert not parsed.refused, parsed.problems
    made.set_cidr_groups(groups)
    made.set_policy(parsed.policies[0].policy, RuleId(16))
    return made


def texts(made: Resolver) -> list[str]:
    """What the one clause chooses; nothing where it is left out."""
    clauses = made.local_policy(WEB).clauses
    return sorted(made.group(group).selector for clause in clauses for group in clause.groups)


def group(*prefixes: str, name: str = "partners", **labels: str) -> CidrGroup:
    held = Labels.parse([f"k8s:{key}={value}" for key, value in labels.items()])
    return CidrGroup(name, held, prefixes)


def test_a_group_is_read_beside_policies() -> None:
    parsed = read(GROUP + "---\n" + POLICY.replace("REF", "{cidrGroupRef: partners}"))
    (found,) = parsed.cidr_groups
    assert found == group("192.0.2.0/25", "198.51.100.7/32", tier="outside")
    assert len(parsed.policies) == 1
    assert texts(resolver("{cidrGroupRef: partners}", found)) == [
        "cidr(192.0.2.0/25)",
        "cidr(198.51.100.7/32)",
    ]


def test_a_node_takes_no_group() -> None:
    problems = read(GROUP, Features.NODE).problems
    assert "CiliumCIDRGroup" in problems[0].message


@pytest.mark.parametrize(
    ("broken", "path"),
    [
        (GROUP.replace("192.0.2.0/25", "192.0.2.0"), "spec.externalCIDRs[0]"),
        (GROUP.replace("name: partners, ", ""), "metadata"),
        (GROUP.replace("externalCIDRs", "externalCidrs"), "spec.externalCidrs"),
        (GROUP.replace("cilium.io/v2", "cilium.io/v9"), ""),
    ],
)
def test_a_broken_group_is_refused_with_its_place(broken: str, path: str) -> None:
    parsed = read(broken)
    assert parsed.refused
    assert parsed.cidr_groups == ()
    assert parsed.problems[0].path == path


def test_a_group_that_does_not_exist_chooses_nobody() -> None:
    made = resolver("{cidrGroupRef: partners}")
    assert made.local_policy(WEB).ingress_enforced
    assert texts(made) == []


def test_labels_choose_groups() -> None:
    ref = "{cidrGroupSelector: {matchLabels: {tier: outside}}}"
    other = group("203.0.113.0/24", name="others", tier="inside")
    assert texts(resolver(ref, group("192.0.2.0/24", tier="outside"), other)) == [
        "cidr(192.0.2.0/24)"
    ]


def test_exceptions_are_taken_out_of_the_prefixes_they_lie_in() -> None:
    ref = "{cidrGroupRef: partners, except: [192.0.2.128/25, 198.51.100.0/24]}"
    found = texts(resolver(ref, group("192.0.2.0/24", "198.51.100.7/32", "203.0.113.0/24")))
    assert found == ["cidr(192.0.2.0/24 except 192.0.2.128/25)", "cidr(203.0.113.0/24)"]


def test_policies_follow_their_groups() -> None:
    made = resolver("{cidrGroupRef: partners}")
    for prefixes in (("192.0.2.0/24",), ("192.0.2.0/24", "10.0.0.0/8"), ()):
        changes = made.set_cidr_groups([group(*prefixes)])
        assert set(changes.locals_changed) == {WEB}
        assert texts(made) == sorted(f"cidr({prefix})" for prefix in prefixes)
        assert made.prefixes().keys() == set(prefixes)
    assert made.rules(next(iter(made.selecting(WEB))))[0].rule_id == 16


networks = st.builds(
    lambda address, length: str(ipaddress.ip_network((address, length), strict=False)),
    st.integers(0, 255).map(lambda low: 0x0A000000 | low),
    st.integers(26, 32),
)


@settings(deadline=None)
@given(
    st.lists(networks, max_size=3, unique=True),
    st.lists(networks, max_size=3, unique=True),
    st.integers(0, 255),
)
def test_an_address_is_chosen_if_a_prefix_holds_it_and_no_exception(prefixes, excepts, low):
    address = ipaddress.ip_address(0x0A000000 | low)

    def held(texts):
        return any(address in ipaddress.ip_network(text) for text in texts)

    peer = CidrGroupPeer("partners", None, tuple(excepts))
    chosen = any(
        held([one.prefix]) and not held(one.excepts)
        for one in expanded(peer, {"partners": group(*prefixes)})
    )
    assert chosen == (held(prefixes) and not held(excepts))
