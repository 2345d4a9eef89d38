"""Addresses of endpoints and of learnt names, in any order of changes as from scratch."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from identity.numbers import HOST, NumericIdentity
from services.policy.clauses import RuleId
from services.policy.features import Features
from services.policy.parse import parse_object
from services.policy.resolve import Resolver, ResolverSettings

PODS = [NumericIdentity(1000 + n) for n in range(3)]
LEARNT = [NumericIdentity((1 << 24) + 77 + n) for n in range(2)]
PREFIXES = ["10.0.0.1/32", "10.0.0.2/32", "10.1.0.1/32", "2001:db8::1/128"]
WORLD = Labels.parse(["reserved:world"])


def policy(kind, clause):
    api = "cilium.io/v2" if kind.startswith("Cilium") else "networking.k8s.io/v1"
    subject = "endpointSelector" if kind.startswith("Cilium") else "podSelector"
    document = {
        "apiVersion": api,
        "kind": kind,
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {subject: {}, "ingress": [clause]},
    }
    found, problems = parse_object(document, "test", "shop", Features.ALL)
    assert found is not None, problems
    return found


def block(cidr, *without):
    return {"cidr": cidr, "except": list(without)}


POLICIES = [
    policy("NetworkPolicy", {"from": [{"ipBlock": block("10.0.0.0/8", "10.1.0.0/16")}]}),
    policy("NetworkPolicy", {"from": [{"ipBlock": block("::/0")}]}),
    policy("CiliumNetworkPolicy", {"fromCIDRSet": [block("10.0.0.0/8", "10.0.0.2/32")]}),
]


def started():
    resolver = Resolver(ResolverSettings())
    resolver.set_identities({number: Labels.parse([f"k8s:pod=p{number}"]) for number in PODS})
    return resolver


moves = st.lists(
    st.one_of(
        st.tuples(st.just("policy"), st.integers(0, 2), st.booleans()),
        st.tuples(
            st.just("address"),
            st.integers(0, 2),
            st.lists(st.sampled_from(PREFIXES), max_size=2, unique=True),
        ),
        st.tuples(st.just("learnt"), st.integers(0, 1), st.sampled_from([*PREFIXES, ""])),
    ),
    max_size=14,
)


@settings(max_examples=200, deadline=None)
@given(moves)
def test_any_order_of_addresses_and_policies_ends_like_a_fresh_start(steps):
    resolver = started()
    held: dict[int, bool] = {}
    addresses: dict[int, list[str]] = {}
    learnt: dict[int, str] = {}
    for what, number, value in steps:
        if what == "policy":
            held[number] = value
            apply_policy(resolver, number, value)
        elif what == "address":
            addresses[number] = value
            resolver.set_addresses(PODS[number], value)
        else:
            learnt[number] = value
            apply_learnt(resolver, number, value)
    fresh = started()
    for number, value in addresses.items():
        fresh.set_addresses(PODS[number], value)
    for number, value in learnt.items():
        apply_learnt(fresh, number, value)
    for number, value in held.items():
        apply_policy(fresh, number, value)
    chosen = [groups_of(each, held) for each in (resolver, fresh)]
    assert chosen[0] == chosen[1]


def groups_of(resolver, held):
    """What each policy's clause chooses, seen from the local policy of a pod in its namespace."""
    watcher = NumericIdentity(1999)
    labels = Labels.parse(["k8s:pod=watcher", "k8s:io.kubernetes.pod.namespace=shop"])
    resolver.set_identities({watcher: labels})
    found = {}
    for clause in resolver.local_policy(watcher).clauses:
        for group in clause.groups:
            view = resolver.group(group)
            found[clause.rule_id, view.selector] = set(view.members)
    assert len([rule for rule, _ in found if rule >= 16]) == sum(held.values())
    return found


def test_an_address_chooses_the_pod_only_where_addresses_are_matched():
    resolver = started()
    for number in range(3):
        apply_policy(resolver, number, present=True)
    resolver.set_addresses(PODS[0], ["10.0.0.1/32"])
    resolver.set_addresses(PODS[1], ["10.1.0.1/32"])
    resolver.place(LEARNT[0], "10.0.0.1/32", WORLD)
    chosen = {
        rule: members for (rule, _), members in groups_of(resolver, {0: 1, 1: 1, 2: 1}).items()
    }
    assert chosen[16] & {*PODS, *LEARNT} == {PODS[0], LEARNT[0]}
    assert chosen[18] & {*PODS, *LEARNT} == {LEARNT[0]}


def apply_policy(resolver, number, present):
    named = replace(POLICIES[number], ref=replace(POLICIES[number].ref, name=f"p{number}"))
    if present:
        resolver.set_policy(named, RuleId(16 + number))
    else:
        resolver.remove_policy(named.ref)


def apply_learnt(resolver, number, prefix):
    if prefix:
        resolver.place(LEARNT[number], prefix, WORLD)
    else:
        resolver.remove_identities([LEARNT[number]])


# ------------------------------------------------------------------ several addresses


def sides(kinds):
    """An allow and a deny of the same CIDR, matched by address."""
    document = {
        "apiVersion": "cilium.io/v2",
        "kind": "CiliumNetworkPolicy",
        "metadata": {"name": "p", "namespace": "shop"},
        "spec": {
            "endpointSelector": {},
            "ingress": [{"fromCIDR": ["10.0.0.0/24"]}],
            "ingressDeny": [{"fromCIDR": ["10.0.0.0/24"]}],
        },
    }
    found, problems = parse_object(document, "test", "shop", Features.ALL)
    assert found is not None, problems
    resolver = Resolver(ResolverSettings(by_address=frozenset(kinds)))
    resolver.set_identities({number: Labels.parse([f"k8s:pod=p{number}"]) for number in PODS})
    resolver.set_policy(found, RuleId(16))
    return resolver


def sides_chosen(resolver):
    watcher = NumericIdentity(1999)
    labels = Labels.parse(["k8s:pod=watcher", "k8s:io.kubernetes.pod.namespace=shop"])
    resolver.set_identities({watcher: labels})
    clauses = resolver.local_policy(watcher).clauses
    own = [clause for clause in clauses if clause.rule_id >= 16]
    return [set(resolver.group(clause.groups[0]).members) & {*PODS, HOST} for clause in own]


INSIDE, OUTSIDE, OTHER_FAMILY = "10.0.0.7/32", "10.9.0.1/32", "2001:db8::7/128"


@pytest.mark.parametrize(
    ("addresses", "allowed", "denied"),
    [
        ([], False, False),
        ([INSIDE], True, True),
        ([OUTSIDE], False, False),
        ([INSIDE, OUTSIDE], False, True),
        ([INSIDE, OTHER_FAMILY], True, True),
        ([OTHER_FAMILY], False, False),
    ],
)
@pytest.mark.parametrize("backwards", [False, True])
def test_an_allow_takes_all_of_the_addresses_and_a_deny_one(addresses, allowed, denied, backwards):
    resolver = sides({"CiliumNetworkPolicy"})
    resolver.set_addresses(PODS[0], ["10.0.0.9/32", "10.8.0.1/32"])
    for n in range(len(addresses) + 1):
        resolver.set_addresses(PODS[0], (addresses[::-1] if backwards else addresses)[:n])
    allow, deny = sides_chosen(resolver)
    assert (PODS[0] in allow, PODS[0] in deny) == (allowed, denied)


def test_the_local_host_is_kept_out_by_all_of_its_addresses_only():
    """It is another host on every node."""
    resolver = sides({"CiliumNetworkPolicy"})
    resolver.set_addresses(HOST, [INSIDE, OUTSIDE])
    assert sides_chosen(resolver) == [set(), set()]
    resolver.set_addresses(HOST, [INSIDE])
    assert sides_chosen(resolver) == [{HOST}, {HOST}]


def test_no_address_counts_where_only_the_outside_does():
    resolver = sides(set())
    resolver.set_addresses(PODS[0], [INSIDE])
    assert sides_chosen(resolver) == [set(), set()]
