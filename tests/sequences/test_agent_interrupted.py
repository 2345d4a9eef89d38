"""Between any two rows an agent writes: nobody is allowed what neither the old nor the new state
allows, nobody refused what both allow, and the next agent finds its way from there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from ipaddress import IPv4Address

from hypothesis import given
from hypothesis import strategies as st
from pyroaring import BitMap

from datapath.agent.enforcement import Enforcement
from datapath.agent.view import Address, Update, View
from datapath.maps.layout import Verdict
from datapath.maps.tables import Tables
from services.policy.clauses import Action, Clause, Direction, LocalPolicy, PortRange
from tests.fakes.agent_sequences import (
    OWN,
    PEERS,
    as_kwargs,
    assert_clean,
    assert_no_cached_verdict_lies,
    dump,
    expected,
    sequences,
    slow,
    snapshot,
    start,
    updates,
    verdicts,
)
from tests.fakes.kernel_lookup import identity_of
from tests.fakes.watched_tables import Killed, watched

ADDRESSES = tuple(f"10.0.0.{n}" for n in range(1, 4))
NUMBERS = {text: int(IPv4Address(text)) for text in ADDRESSES}

elsewhere = st.builds(
    Address,
    cidr=st.sampled_from(ADDRESSES),
    identity=st.sampled_from(PEERS),
    node=st.just("n2"),
)
moves = st.builds(
    lambda update, put, removed: replace(
        update, snapshot=False, addresses=tuple(put), addresses_removed=tuple(removed)
    ),
    updates,
    st.lists(elsewhere, max_size=3),
    st.lists(st.sampled_from(ADDRESSES), max_size=1),
)


class Watch:
    """What the tables answered before each row that was written."""

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.seen: list[dict] = []
        self.where: list[dict[str, int]] = []
        self.watching = False

    def __call__(self) -> None:
        if self.watching:
            self.look()

    def look(self) -> None:
        self.seen.append(dump(self.tables))
        self.where.append({a: identity_of(self.tables, n) for a, n in NUMBERS.items()})


def allows(found: dict, *key: object) -> bool:
    return found[key][0] is Verdict.ALLOW


def settled(updates_: list[Update], tables: Tables) -> Enforcement:
    enforcement = start(tables)
    placed = tuple(Address(a, PEERS[n], "n2") for n, a in enumerate(ADDRESSES))
    enforcement.realise([Update(1, addresses=placed)])
    for update in updates_:
        enforcement.realise([update])
    return enforcement


@slow
@given(st.lists(moves, max_size=3), moves)
def test_between_two_rows_every_answer_is_the_old_or_the_new_one(
    before: list[Update], update: Update
) -> None:
    bare = Tables.memory()
    watch = Watch(bare)
    enforcement = settled(before, watched(bare, watch))
    watch.watching = True
    watch.look()
    old_view = dict(enforcement.view.addresses)
    enforcement.realise([update])
    watch.look()
    old, new = watch.seen[0], watch.seen[-1]
    for seen in watch.seen:
        assert_no_cached_verdict_lies(seen, new)
        for key in seen:
            assert seen[key][0] in (old[key][0], new[key][0]), key
    came = {a.identity for c, a in enforcement.view.addresses.items() if a != old_view.get(c)}
    for address, was in watch.where[0].items():
        if address not in old_view or was in came:
            continue
        for identity, direction, peer, proto, port in old:
            if peer != was:
                continue
            ends = [
                allows(seen, identity, direction, where[address], proto, port)
                for seen, where in zip(watch.seen, watch.where, strict=True)
            ]
            assert set(ends) <= {ends[0], ends[-1]}, (address, direction, proto, port)


@slow
@given(sequences, updates, st.data())
def test_an_agent_killed_between_two_rows_leaves_what_the_next_one_can_mend(
    saved: list[Update], last: Update, data: st.DataObject
) -> None:
    rehearsal = Tables.memory()
    watch = Watch(rehearsal)
    agent = settled(saved, watched(rehearsal, watch))
    held = dict(rehearsal.endpoints.items())
    old = verdicts(rehearsal)
    checkpoint = as_kwargs(View(**as_kwargs(agent.view)))
    checkpoint = {name: dict(rows) for name, rows in checkpoint.items()}
    watch.watching = True
    agent.realise([last])
    new = verdicts(rehearsal)
    rows = data.draw(st.integers(0, len(watch.seen)), label="rows written")

    bare = Tables.memory()
    left = [-1]

    def kill() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    agent = settled(saved, watched(bare, kill))
    before = dump(bare)
    left[0] = rows + 1
    with suppress(Killed):
        agent.realise([last])
    killed = dump(bare)
    written = data.draw(st.booleans(), label="the view was written")
    view = View(**(as_kwargs(agent.view) if written else checkpoint))
    following = Enforcement(bare, view, own_nodes=OWN)
    following.recover(held)
    recovered = dump(bare)
    for cached in (before, killed):
        assert_no_cached_verdict_lies(cached, recovered)
    for key, (verdict, *_) in recovered.items():
        assert verdict in (old[key][0], new[key][0]), key
    following.realise([snapshot(agent.view)])
    for cached in (before, killed, recovered):
        assert_no_cached_verdict_lies(cached, dump(bare))
    assert_clean(following, bare)
    for (identity, *rest), (verdict, _) in verdicts(bare).items():
        if identity in following.view.locals:
            assert verdict is expected(following.view, identity, *rest)


IN, TCP80 = Direction.INGRESS, (PortRange(6, 80, 80),)
A, B, C = 256, 257, 258


def judged(update: Update, begins: int = A) -> list[bool]:
    """Whether 10.0.0.1 reaches port 80 of identity 300, before each row that `update` writes and
    at the end. It begins as A, or `begins`; group 11 is A and B, group 12 is C; 11 is allowed."""
    bare = Tables.memory()
    watch = Watch(bare)
    enforcement = settled([], watched(bare, watch))
    members = ((11, BitMap([A, B])), (12, BitMap([C])), (13, BitMap()))
    policy = LocalPolicy(300, True, True, (Clause(IN, (11,), TCP80, Action.ALLOW, 16),), (), ())
    place = (Address("10.0.0.1", begins, "n2"),)
    enforcement.realise([Update(1, groups=members, local_policies=(policy,), addresses=place)])
    watch.watching = True
    enforcement.realise([update])
    watch.look()
    return [
        allows(seen, 300, IN, where["10.0.0.1"], 6, 80)
        for seen, where in zip(watch.seen, watch.where, strict=True)
    ]


def changed(*clauses: Clause, identity: int, groups: dict[int, set[int]] | None = None) -> Update:
    return Update(
        2,
        groups=tuple((group, BitMap(ids)) for group, ids in (groups or {}).items()),
        local_policies=(LocalPolicy(300, True, True, clauses, (), ()),) if clauses else (),
        addresses=(Address("10.0.0.1", identity, "n2"),),
    )


def test_an_address_goes_to_a_new_identity_while_the_old_one_loses_its_rights() -> None:
    assert all(judged(changed(identity=C, groups={11: {B, C}})))


def test_an_address_goes_to_an_identity_that_loses_its_rights() -> None:
    ends = judged(changed(identity=B, groups={11: {A}}))
    assert ends == sorted(ends, reverse=True)
    assert not ends[-1]
    assert not any(judged(changed(identity=B, groups={11: {A}}), begins=C))


def test_an_address_leaves_an_identity_that_is_denied_by_new_clauses() -> None:
    deny = Clause(IN, (13,), (), Action.DENY, 17)
    allow = Clause(IN, (12,), TCP80, Action.ALLOW, 18)
    assert all(judged(changed(deny, allow, identity=C, groups={13: {A}})))


def test_an_address_that_loses_its_rights_on_the_way_loses_them_once() -> None:
    ends = judged(changed(Clause(IN, (12,), TCP80, Action.ALLOW, 18), identity=B))
    assert ends == sorted(ends, reverse=True)
    assert not ends[-1]
