"""The incremental resolver: what it tells, and that it equals a resolver built from scratch."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from identity.labels import Labels
from identity.numbers import HOST, WORLD, NumericIdentity
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    RULE_DEFAULT_ALLOW,
    Action,
    Direction,
    PolicyRef,
    PortRange,
    RuleId,
)
from services.policy.compile import Verdict, compile_direction
from services.policy.model import CidrPeer
from services.policy.parse import parse
from services.policy.prefixes import remaining
from services.policy.resolve import Resolver, ResolverSettings, rule_count
from services.runtime.errors import NotFound

SEED = Path(__file__).parents[2] / "policies" / "seed"
NS = "k8s:io.kubernetes.pod.namespace"
CLUSTER = "k8s:io.cilium.k8s.policy.cluster=default"
TCP, UDP = 6, 17


def pod(*labels, namespace="shop"):
    return Labels.parse([*(f"k8s:{label}" for label in labels), f"{NS}={namespace}", CLUSTER])


WEB, DB, OTHER = (NumericIdentity(n) for n in (1001, 1002, 1003))
PODS = {WEB: pod("app=web"), DB: pod("app=db"), OTHER: pod("app=web", namespace="other")}


def policy(spec, name="p", kind="CiliumNetworkPolicy", namespace="shop"):
    api = "networking.k8s.io/v1" if kind == "NetworkPolicy" else "cilium.io/v2"
    text = f"apiVersion: {api}\nkind: {kind}\nmetadata: {{name: {name}}}\nspec: {spec}\n"
    parsed = parse(text.encode(), "test", namespace)
    assert not parsed.refused, parsed.problems
    return parsed.policies[0].policy


def resolver(*policies, identities=PODS, **options):
    made = Resolver(ResolverSettings(**options))
    made.set_identities(identities)
    base = 16
    for each in policies:
        made.set_policy(each, RuleId(base))
        base += rule_count(each)
    return made


def judge(made, subject, peer, *, direction=Direction.INGRESS, proto=TCP, port=80):
    compiled = compile_direction(made.local_policy(subject), direction)
    if compiled is None:
        return Verdict.ALLOW
    found = compiled.partition(lambda g: made.group(g).members, BitMap([peer]))
    (answer,) = found
    return answer.lookup(proto, port).verdict


DB_FROM_WEB = policy(
    "{endpointSelector: {matchLabels: {app: db}}, ingress: [{fromEndpoints:"
    " [{matchLabels: {app: web}}], toPorts: [{ports: [{port: '5432', protocol: TCP}]}]}]}"
)


def test_a_clause_admits_the_peers_of_its_own_namespace_on_its_ports():
    made = resolver(DB_FROM_WEB)
    assert judge(made, DB, WEB, port=5432) is Verdict.ALLOW
    assert judge(made, DB, WEB, port=80) is Verdict.NONE
    assert judge(made, DB, OTHER, port=5432) is Verdict.NONE
    assert judge(made, WEB, DB) is Verdict.ALLOW


def test_rule_ids_count_clauses_and_name_their_line():
    text = (
        b"apiVersion: cilium.io/v2\nkind: CiliumNetworkPolicy\nmetadata: {name: p}\nspec:\n"
        b"  endpointSelector: {}\n  egressDeny:\n  - toEntities: [world]\n"
        b"  ingress:\n  - {}\n  - fromEntities: [host]\n"
    )
    parsed = parse(text, "test", "shop").policies[0].policy
    assert rule_count(parsed) == 3
    made = resolver()
    changes = made.set_policy(parsed, RuleId(40))
    said = [(s.rule_id, s.clause, s.line) for s in changes.rules_added]
    assert said == [(40, "ingress[0]", 9), (41, "ingress[1]", 10), (42, "egressDeny[0]", 7)]
    assert made.rule(RuleId(41)) == changes.rules_added[1]
    assert made.rules(parsed.ref) == changes.rules_added
    assert str(made.rule(RuleId(42))) == ("CiliumNetworkPolicy shop/p rule 0 egressDeny[0] line 7")
    assert made.remove_policy(parsed.ref).rules_removed == (40, 41, 42)
    assert made.rule(RuleId(41)) is None


def test_a_new_identity_changes_groups_and_no_other_local_policy():
    made = resolver(DB_FROM_WEB)
    before = made.local_policy(DB)
    changes = made.set_identities({NumericIdentity(1004): pod("app=web", "v=2")})
    assert changes.locals_changed == BitMap([1004])
    assert [d.added for d in changes.group_deltas.values()] == [BitMap([1004])]
    assert changes.groups_added == ()
    assert made.local_policy(DB) is before


def test_an_identity_no_selector_chooses_changes_no_group():
    changes = resolver(DB_FROM_WEB).set_identities(
        {NumericIdentity(9): pod("x=y")} | {NumericIdentity(2000): pod("x=y")}
    )
    assert changes.group_deltas == {}


def test_a_relabelled_identity_moves_between_groups():
    made = resolver(DB_FROM_WEB)
    (group,) = [g for c in made.local_policy(DB).clauses if c.rule_id >= 16 for g in c.groups]
    changes = made.set_identities({WEB: pod("app=api")})
    assert changes.group_deltas[group].removed == BitMap([WEB])
    assert made.group(group).members == BitMap()
    assert WEB in changes.locals_changed


def test_a_removed_identity_leaves_its_groups_and_is_unknown():
    made = resolver(DB_FROM_WEB)
    changes = made.remove_identities([WEB, HOST, NumericIdentity(77777)])
    assert [d.removed for d in changes.group_deltas.values()] == [BitMap([WEB])]
    assert not made.knows(WEB)
    assert made.knows(HOST)
    with pytest.raises(NotFound):
        made.local_policy(WEB)


def test_locals_changed_are_those_selected_before_or_after():
    made = resolver(DB_FROM_WEB)
    moved = policy("{endpointSelector: {matchLabels: {app: web}}, ingress: [{}]}")
    assert made.set_policy(moved, RuleId(50)).locals_changed == BitMap([WEB, DB])
    assert made.local_policy(DB).ingress_enforced is False
    assert made.selected_by(moved.ref) == BitMap([WEB])
    assert made.remove_policy(moved.ref).locals_changed == BitMap([WEB])
    assert made.selected_by(moved.ref) == BitMap()


def test_the_same_policy_again_changes_nothing():
    made = resolver(DB_FROM_WEB)
    changes = made.set_policy(DB_FROM_WEB, RuleId(16))
    assert changes == type(changes)()


def test_a_group_lives_as_long_as_a_policy_uses_it():
    made = resolver(DB_FROM_WEB)
    twin = policy(
        "{endpointSelector: {}, egress: [{toEndpoints: [{matchLabels: {app: web}}]}]}", name="q"
    )
    assert made.set_policy(twin, RuleId(60)).groups_added == ()
    assert made.remove_policy(DB_FROM_WEB.ref).groups_removed == ()
    (gone,) = made.remove_policy(twin.ref).groups_removed
    with pytest.raises(NotFound):
        made.group(gone)


def test_group_ids_come_from_the_selector_text():
    first, second = resolver(DB_FROM_WEB), resolver(DB_FROM_WEB, identities={})
    groups = [c.groups for c in first.local_policy(DB).clauses]
    second.set_identities(PODS)
    assert [c.groups for c in second.local_policy(DB).clauses] == groups
    text = first.group(groups[-1][0]).selector
    assert text == f"app=web,{NS}=shop"


def test_identities_that_cannot_be_endpoints_are_never_subjects():
    everyone = policy(
        "{endpointSelector: {}, ingress: [{fromCIDR: [10.0.0.0/8]}]}",
        kind="CiliumClusterwideNetworkPolicy",
    )
    made = resolver(everyone)
    # Pods, and the reserved identities that have an endpoint: health, init, ingress.
    assert made.selected_by(everyone.ref) == BitMap([WEB, DB, OTHER, 4, 5, 8])
    assert made.local_policy(HOST).ingress_enforced is False


def test_init_endpoints_are_always_enforced():
    made = resolver()
    assert made.local_policy(NumericIdentity(5)).ingress_enforced
    assert judge(made, NumericIdentity(5), WEB) is Verdict.NONE


# ------------------------------------------------------------------ prefixes


def cidr_policy(*entries, name="c", field="toCIDR"):
    return policy(
        f"{{endpointSelector: {{}}, egress: [{{{field}: [{', '.join(entries)}]}}]}}", name
    )


def test_prefixes_get_node_local_identities_that_lie_in_wider_prefixes():
    made = resolver(cidr_policy("10.0.0.0/8"))
    changes = made.set_policy(cidr_policy("10.1.0.0/16", name="d"), RuleId(90))
    (narrow,) = changes.prefixes_added.values()
    assert narrow >> 24 == 1
    assert [d.added for d in changes.group_deltas.values()] == [BitMap([narrow])]
    assert set(made.prefixes()) == {"10.0.0.0/8", "10.1.0.0/16"}
    gone = made.remove_policy(PolicyRef("CiliumNetworkPolicy", "shop", "d"))
    assert gone.prefixes_removed == {"10.1.0.0/16": narrow}
    assert [d.removed for d in gone.group_deltas.values()] == [BitMap([narrow])]


def test_prefix_identities_do_not_depend_on_order():
    one = resolver(cidr_policy("10.0.0.0/8"), cidr_policy("10.1.0.0/16", name="d"))
    two = resolver(cidr_policy("10.1.0.0/16", name="d"), cidr_policy("10.0.0.0/8"))
    assert one.prefixes() == two.prefixes()


def test_the_whole_address_space_includes_the_world_but_not_with_exceptions():
    made = resolver(cidr_policy("0.0.0.0/0"))
    assert judge(made, WEB, WORLD, direction=Direction.EGRESS) is Verdict.ALLOW
    block = "{cidr: 0.0.0.0/0, except: [10.0.0.0/8]}"
    made = resolver(cidr_policy(block, field="toCIDRSet"))
    assert judge(made, WEB, WORLD, direction=Direction.EGRESS) is Verdict.NONE
    assert len(made.prefixes()) == 8


def test_ipv6_prefixes_resolve_the_same_way():
    made = resolver(cidr_policy('"2001:db8::/32"', '"2001:db8:1::/48"'))
    members = made.group(made.local_policy(WEB).clauses[-1].groups[0]).members
    assert members == BitMap(made.prefixes().values())


def test_entity_world_includes_prefix_identities():
    made = resolver(
        cidr_policy("10.0.0.0/8"),
        policy("{endpointSelector: {}, egress: [{toEntities: [world]}]}", "w"),
    )
    (number,) = made.prefixes().values()
    assert judge(made, WEB, number, direction=Direction.EGRESS) is Verdict.ALLOW


networks = st.builds(
    lambda a, n: ipaddress.ip_network((a, n), strict=False),
    st.integers(0x0A000000, 0x0A00FFFF),
    st.integers(16, 32),
)


@given(st.lists(networks, max_size=4), st.integers(0x0A000000, 0x0A00FFFF))
@settings(max_examples=150, deadline=None)
def test_remaining_prefixes_cover_what_is_not_excepted(excepts, address):
    peer = CidrPeer("10.0.0.0/16", tuple(str(n) for n in excepts))
    pieces = remaining(peer)
    at = ipaddress.ip_address(address)
    assert sum(at in piece for piece in pieces) == (not any(at in hole for hole in excepts))
    assert list(ipaddress.collapse_addresses(pieces)) == list(pieces)


# ------------------------------------------------------------------ settings


def test_the_local_host_is_let_in_unless_denied():
    made = resolver(DB_FROM_WEB)
    assert judge(made, DB, HOST) is Verdict.ALLOW
    (clause,) = [c for c in made.local_policy(DB).clauses if c.rule_id == RULE_ALLOW_LOCALHOST]
    assert clause.direction is Direction.INGRESS
    denied = resolver(
        DB_FROM_WEB,
        policy("{endpointSelector: {}, ingressDeny: [{fromEntities: [all]}]}", "deny"),
    )
    assert judge(denied, DB, HOST) is Verdict.DENY
    assert judge(resolver(DB_FROM_WEB, allow_localhost=False), DB, HOST) is Verdict.NONE


def test_default_deny_off_allows_all_but_what_is_denied():
    made = resolver(
        policy(
            "{endpointSelector: {}, enableDefaultDeny: {ingress: false},"
            " ingressDeny: [{fromEndpoints: [{matchLabels: {app: web}}]}]}"
        )
    )
    local = made.local_policy(DB)
    assert local.ingress_enforced
    assert any(c.rule_id == RULE_DEFAULT_ALLOW and c.action is Action.ALLOW for c in local.clauses)
    assert judge(made, DB, WEB) is Verdict.DENY
    assert judge(made, DB, OTHER) is Verdict.ALLOW


def test_always_enforces_what_no_policy_selects_and_never_enforces_nothing():
    assert judge(resolver(enforcement="always"), DB, WEB) is Verdict.NONE
    assert judge(resolver(DB_FROM_WEB, enforcement="never"), DB, WEB) is Verdict.ALLOW


def test_policies_that_isolate_are_the_reason_of_a_default_deny():
    soft = policy(
        "{endpointSelector: {}, enableDefaultDeny: {ingress: false}, ingress: [{}]}", "soft"
    )
    local = resolver(DB_FROM_WEB, soft).local_policy(DB)
    assert local.ingress_policies == (DB_FROM_WEB.ref,)
    assert local.egress_policies == ()


# ------------------------------------------------------------------ seed


def seed(namespace="vmagent-system"):
    texts = [path.read_bytes() for path in sorted(SEED.glob("*.yaml"))]
    parsed = [parse(text, "seed", namespace) for text in texts]
    assert not any(p.refused for p in parsed)
    return [p.policies[0].policy for p in parsed]


def test_the_seed_policies_do_what_they_say():
    agent = NumericIdentity(3001)
    pods = PODS | {
        agent: pod(
            "io.cilium.k8s.policy.serviceaccount=victoria-metrics-agent-usr",
            namespace="vmagent-system",
        ),
        NumericIdentity(3002): pod("a=b", namespace="vmagent-system"),
        NumericIdentity(3003): pod("a=b", namespace="desired-namespace"),
        NumericIdentity(3004): pod("a=b", namespace="infra-istio"),
    }
    made = resolver(*seed(), identities=pods)
    out = Direction.EGRESS
    for peer, port, verdict in (
        (3002, 80, Verdict.ALLOW),  # own namespace
        (3003, 80, Verdict.ALLOW),
        (3004, 8443, Verdict.ALLOW),
        (3004, 80, Verdict.NONE),
        (WEB, 80, Verdict.NONE),
        (WORLD, 80, Verdict.NONE),
    ):
        assert judge(made, agent, NumericIdentity(peer), direction=out, port=port) is verdict
    assert judge(made, WEB, NumericIdentity(3004), direction=out, port=8443) is Verdict.ALLOW
    assert judge(made, WEB, DB, direction=out) is Verdict.NONE


def test_the_host_firewall_seed_is_for_every_node_and_no_endpoint():
    host = seed()[3]
    made = resolver(host)
    assert host.state == "enforced on nodes with [agent] host_firewall = true"
    assert made.selected_by(host.ref) == BitMap([HOST])
    assert len(made.rules(host.ref)) == 1
    assert made.local_policy(WEB).ingress_enforced is False
    node = made.local_policy(HOST)
    assert (node.ingress_enforced, node.egress_enforced) == (True, False)
    assert [clause.ports for clause in node.clauses] == [(PortRange(TCP, 10250, 10250),)]


def test_an_endpoint_policy_for_everybody_leaves_the_nodes_alone():
    made = resolver(policy({"endpointSelector": {}, "ingress": [{}]}))
    assert made.local_policy(HOST).ingress_enforced is False


# ------------------------------------------------------------------ incremental = from scratch

SPECS = [
    "{endpointSelector: {}, ingress: [{fromEndpoints: [{}]}]}",
    "{endpointSelector: {matchLabels: {app: a}}, ingress: [{fromEntities: [cluster]}]}",
    "{endpointSelector: {matchLabels: {app: b}}, egress: [{toCIDR: [10.0.0.0/8, 10.1.0.0/16]}]}",
    "{endpointSelector: {}, egress: [{toCIDRSet: [{cidr: 10.0.0.0/8, except: [10.1.0.0/16]}]}]}",
    "{endpointSelector: {}, egressDeny: [{toCIDR: [10.1.0.0/16]}], egress: [{toEntities: [all]}]}",
    "{endpointSelector: {}, egress: [{toEntities: [world]}, {toCIDR: [0.0.0.0/0]}]}",
    "{endpointSelector: {}, ingress: [{fromEndpoints: [{matchExpressions:"
    " [{key: app, operator: NotIn, values: [a]}]}]}]}",
]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), st.integers(0, 2), st.integers(0, len(SPECS) - 1)),
        st.tuples(st.just("drop"), st.integers(0, 2), st.just(0)),
        st.tuples(st.just("add"), st.integers(1001, 1006), st.integers(0, 3)),
        st.tuples(st.just("gone"), st.integers(1001, 1006), st.just(0)),
    ),
    max_size=14,
)
POLICIES = [[policy(spec, f"p{n}") for spec in SPECS] for n in range(3)]


@given(steps)
@settings(max_examples=150, deadline=None)
def test_any_order_of_changes_ends_like_a_fresh_start(moves):
    made = Resolver(ResolverSettings())
    pods: dict[NumericIdentity, Labels] = {}
    held = {}
    mirror: dict[int, BitMap] = {}
    prefixes: dict[str, int] = {}
    for what, number, choice in moves:
        identity = NumericIdentity(number)
        if what == "set":
            held[number] = POLICIES[number][choice]
            changes = made.set_policy(held[number], RuleId(16 + 10 * number))
        elif what == "drop":
            changes = made.remove_policy(POLICIES[number][0].ref)
            held.pop(number, None)
        elif what == "add":
            pods[identity] = pod(f"app={'abcd'[choice]}")
            changes = made.set_identities({identity: pods[identity]})
        else:
            pods.pop(identity, None)
            changes = made.remove_identities([identity])
        follow(mirror, prefixes, changes, made)
    fresh = Resolver(ResolverSettings())
    fresh.set_identities(pods)
    for number, each in held.items():
        fresh.set_policy(each, RuleId(16 + 10 * number))
    assert made.prefixes() == fresh.prefixes() == prefixes
    for identity in pods:
        assert made.local_policy(identity) == fresh.local_policy(identity)
        for clause in made.local_policy(identity).clauses:
            for group in clause.groups:
                assert made.group(group) == fresh.group(group)
    for group, members in mirror.items():
        assert made.group(group).members == members


def follow(mirror, prefixes, changes, made):
    """A node that hears only Changes, and reads new groups once."""
    for group in changes.groups_added:
        assert group not in mirror
        mirror[group] = made.group(group).members
    for group, delta in changes.group_deltas.items():
        assert not delta.added & delta.removed
        assert not delta.added & mirror.get(group, BitMap())
        if group in mirror:  # the group of the local host is never announced
            mirror[group] = (mirror[group] | delta.added) - delta.removed
    for group in changes.groups_removed:
        del mirror[group]
    prefixes.update(changes.prefixes_added)
    for prefix, number in changes.prefixes_removed.items():
        assert prefixes.pop(prefix) == number
