"""Any sequence of updates ends where a fresh start from the final state ends, and on the way no
verdict that conntrack may have cached outlives the policy that gave it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datapath.agent.enforcement import Enforcement
from datapath.agent.view import Update, View
from datapath.maps.tables import Sizes, Tables
from datapath.reconcile import Contents, apply, plan, read
from tests.fakes.agent_sequences import (
    LOCALS,
    OWN,
    as_kwargs,
    assert_clean,
    assert_no_cached_verdict_lies,
    dump,
    endpoint,
    expected,
    sequences,
    slow,
    snapshot,
    start,
    verdicts,
)


@slow
@given(sequences)
def test_any_sequence_of_updates_ends_as_from_scratch(sequence: list[Update]) -> None:
    tables = Tables.memory()
    enforcement = start(tables)
    for update in sequence:
        before = dump(tables)
        assert not enforcement.realise([update]).failures
        assert_no_cached_verdict_lies(before, dump(tables))
        assert_clean(enforcement, tables)
    for (identity, *rest), (verdict, _) in verdicts(tables).items():
        if identity in enforcement.view.locals:
            assert verdict is expected(enforcement.view, identity, *rest)
    if set(enforcement.view.locals) != set(LOCALS):
        return  # an endpoint without a policy keeps its last one; a fresh start has none to keep
    fresh = Tables.memory()
    again = Enforcement(fresh, enforcement.view, own_nodes=OWN)
    again.recover(dict(map(endpoint, LOCALS)))
    assert verdicts(fresh) == verdicts(tables)
    assert read(fresh).ipcache == read(tables).ipcache
    assert read(fresh).prefixes == read(tables).prefixes


@slow
@given(sequences, st.integers(6, 40), st.integers(1, 12))
def test_a_full_table_leaves_the_last_good_policy(
    sequence: list[Update], peers_max: int, ports_max: int
) -> None:
    tables = Tables.memory(
        Sizes(policy_peer_max=peers_max, policy_port_max=ports_max, policy_range_max=9)
    )
    enforcement = start(tables)
    for update in sequence:
        before = dump(tables)
        failures = enforcement.realise([update]).failures
        after = dump(tables)
        assert_no_cached_verdict_lies(before, after)
        assert_clean(enforcement, tables)
        for key, (verdict, *_) in after.items():
            identity, *rest = key
            if identity not in failures and identity in enforcement.view.locals:
                assert verdict is expected(enforcement.view, identity, *rest)
            elif (identity, key[1]) in enforcement._stale:
                assert after[key][:2] == before[key][:2]


@slow
@given(sequences, sequences)
def test_a_restart_writes_nothing_and_takes_over_what_a_lagging_checkpoint_lacks(
    saved: list[Update], unsaved: list[Update]
) -> None:
    tables = Tables.memory()
    enforcement = start(tables)
    for update in saved:
        enforcement.realise([update])
    old = View(
        locals_=enforcement.view.locals,
        groups=enforcement.view.groups,
        addresses=enforcement.view.addresses,
    )
    same = Enforcement(tables, View(**as_kwargs(enforcement.view)), own_nodes=OWN)
    held = {index: replace(row) for index, row in tables.endpoints.items()}
    assert same.recover(held).rows() == 0
    for update in unsaved:
        same.realise([update])
    before = verdicts(tables)
    lagging = Enforcement(tables, old, own_nodes=OWN)
    assert lagging.recover(held).rows() == 0
    assert verdicts(tables) == before
    cached = dump(tables)
    lagging.realise([snapshot(same.view)])
    assert_no_cached_verdict_lies(cached, dump(tables))
    assert_clean(lagging, tables)
    for (identity, *rest), (verdict, _) in verdicts(tables).items():
        if identity in lagging.view.locals:
            assert verdict is expected(lagging.view, identity, *rest)


@slow
@given(sequences, sequences)
def test_applying_the_plan_yields_the_desired_tables(
    one: list[Update], other: list[Update]
) -> None:
    tables, target = Tables.memory(), Tables.memory()
    first_, second = start(tables), start(target)
    for update in one:
        first_.realise([update])
    for update in other:
        second.realise([update])
    desired: Contents = read(target)
    apply(plan(desired, read(tables), {}), tables)
    assert read(tables) == desired


def test_an_endpoint_waits_for_the_policy_of_its_identity() -> None:
    tables = Tables.memory()
    enforcement = Enforcement(tables, View(), own_nodes=OWN)
    enforcement.recover({})
    with pytest.raises(Exception, match="has not arrived"):
        enforcement.add_endpoint(*endpoint(300))
    assert not list(tables.endpoints.items())
