"""Random sequences of Updates for an agent on tables in memory, and what the tables then answer."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pyroaring import BitMap

from datapath.agent.enforcement import Enforcement
from datapath.agent.view import Address, GroupDelta, Update, View
from datapath.maps.layout import Endpoint, EndpointFlags, Verdict
from datapath.maps.tables import Tables
from datapath.reconcile import plan, read
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    Action,
    Clause,
    Direction,
    LocalPolicy,
    PortRange,
)
from tests.fakes.kernel_lookup import judge

LOCALS = (300, 301)
PEERS = tuple(range(256, 261))
GROUPS = (11, 12, 13, 14)
PROBES = ((6, 80), (6, 81), (6, 8080), (6, 9999), (17, 53), (1, 8), (47, 0))
PORTS = (
    (),
    (PortRange(6, 80, 80),),
    (PortRange(6, 80, 81), PortRange(17, 53, 53)),
    (PortRange(6, 8000, 8191),),
    (PortRange(6, 0, 65535),),
    (PortRange(1, 8, 8),),
)
OWN = frozenset(["n1"])

members = st.sets(st.sampled_from(PEERS)).map(BitMap)
clauses = st.builds(
    Clause,
    direction=st.sampled_from(Direction),
    groups=st.lists(st.sampled_from(GROUPS), max_size=2, unique=True).map(tuple),
    ports=st.sampled_from(PORTS),
    action=st.sampled_from([Action.ALLOW, Action.ALLOW, Action.DENY]),
    rule_id=st.integers(16, 22),
)
policies = st.builds(
    LocalPolicy,
    identity=st.sampled_from(LOCALS),
    ingress_enforced=st.booleans(),
    egress_enforced=st.booleans(),
    clauses=st.lists(clauses, max_size=4).map(tuple),
    ingress_policies=st.just(()),
    egress_policies=st.just(()),
)
addresses = st.builds(
    Address,
    cidr=st.sampled_from(["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.1.0.0/16", "10.9.0.1"]),
    identity=st.sampled_from(PEERS),
    node=st.sampled_from(["n1", "n2"]),
)
some = {"max_size": 2}
updates = st.builds(
    Update,
    revision=st.just(0),
    snapshot=st.sampled_from([False, False, False, True]),
    groups=st.lists(st.tuples(st.sampled_from(GROUPS), members), **some).map(tuple),
    group_deltas=st.lists(
        st.builds(GroupDelta, id=st.sampled_from(GROUPS), added=members, removed=members), **some
    ).map(tuple),
    local_policies=st.lists(policies, **some).map(tuple),
    addresses=st.lists(addresses, **some).map(tuple),
    addresses_removed=st.lists(st.sampled_from(["10.0.0.1", "10.1.0.0/16"]), **some).map(tuple),
    groups_removed=st.lists(st.sampled_from(GROUPS), max_size=1).map(tuple),
)
sequences = st.lists(updates, min_size=1, max_size=8)
slow = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


def first() -> Update:
    """Both local identities known, so that their endpoints can be made."""
    return Update(
        0,
        snapshot=True,
        local_policies=tuple(LocalPolicy(i, True, True, (), (), ()) for i in LOCALS),
    )


def endpoint(identity: int) -> tuple[int, Endpoint]:
    at = identity - 290
    flags = EndpointFlags.READY
    return at, Endpoint(at, identity, 0, 0, flags, 0x0A090000 + at, b"\x02" * 6, b"\x04" * 6)


def start(tables: Tables) -> Enforcement:
    enforcement = Enforcement(tables, View(), own_nodes=OWN)
    enforcement.recover({})
    enforcement.realise([first()])
    for identity in LOCALS:
        enforcement.add_endpoint(*endpoint(identity))
    return enforcement


def expected(view: View, identity: int, direction: Direction, peer: int, proto: int, port: int):
    """The four-line rule, from the view, without compiling anything."""
    policy = view.locals[identity]
    mine = [c for c in policy.clauses if c.direction is direction]
    enforced = policy.ingress_enforced if direction is Direction.INGRESS else policy.egress_enforced
    if direction is Direction.INGRESS and enforced and peer == 1:
        mine.append(Clause(direction, (), (), Action.ALLOW, RULE_ALLOW_LOCALHOST))
    matching = [
        c
        for c in mine
        if (not c.groups or any(peer in view.groups.get(g, ()) for g in c.groups))
        and (not c.ports or any(p.proto == proto and p.lo <= port <= p.hi for p in c.ports))
    ]
    if any(c.action is Action.DENY for c in matching):
        return Verdict.DENY
    if matching or not enforced:
        return Verdict.ALLOW
    return Verdict.NONE


def dump(tables: Tables):
    """(identity, direction, peer, proto, port) -> (verdict, rule, slot, revision)."""
    found = {}
    for _, row in tables.endpoints.items():
        for direction, slot in ((Direction.INGRESS, row.slot_in), (Direction.EGRESS, row.slot_out)):
            revision = tables.policy_slot.get(slot).revision
            for peer in (0, 1, 2, *PEERS):
                for proto, port in PROBES:
                    answer = judge(tables, slot, peer, proto, port)
                    key = (row.identity, direction, peer, proto, port)
                    found[key] = (*answer, slot, revision)
    return found


def verdicts(tables: Tables):
    return {key: value[:2] for key, value in dump(tables).items()}


def assert_no_cached_verdict_lies(before, after) -> None:
    for key, (verdict, rule, slot, revision) in before.items():
        now = after[key]
        if verdict is Verdict.ALLOW and now[2:] == (slot, revision):
            assert now[:2] == (verdict, rule), f"{key}: cached {verdict, rule}, now {now[:2]}"


def assert_clean(enforcement: Enforcement, tables: Tables) -> None:
    """No row too many or too few, and dead slots and classes are gone."""
    actual = read(tables)
    ops = plan(enforcement.desired(actual), actual, {})
    assert ops.rows() == 0, ops


def as_kwargs(view: View):
    return {
        "locals_": view.locals,
        "groups": view.groups,
        "rules": view.rules,
        "addresses": view.addresses,
    }


def snapshot(view: View) -> Update:
    return Update(
        1,
        snapshot=True,
        groups=tuple(view.groups.items()),
        local_policies=tuple(view.locals.values()),
        addresses=tuple(view.addresses.values()),
    )
