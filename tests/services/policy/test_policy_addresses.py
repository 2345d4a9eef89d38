"""Addresses of endpoints and of learnt names, in any order of changes as from scratch."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from identity.labels import Labels
from identity.numbers import NumericIdentity
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
