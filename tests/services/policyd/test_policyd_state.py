"""The state, its change-sets, and when subscribers hear of them."""

from __future__ import annotations

import asyncio
from ipaddress import ip_network

import pytest
from pyroaring import BitMap

from identity.numbers import HOST, REMOTE_NODE, NumericIdentity
from services.policy.clauses import GroupId
from services.policy.resolve import GroupChange, Resolver, ResolverSettings
from services.policyd.addresses import Addresses, Announcement, Settled
from services.policyd.change import ChangeSet, Gathering, compose
from services.policyd.distribute import Distributor
from services.policyd.records import object_key, ref_of
from services.policyd.state import State
from services.runtime.errors import Invalid
from services.store.model import Changed, KeyValue, Revision, Synced
from tests.fakes import cluster_keys as keys
from tests.fakes.clock import FakeClock

WEB = NumericIdentity(1001)


def fresh() -> State:
    return State(Resolver(ResolverSettings(allow_localhost=False)))


def changed(item: tuple[str, bytes], revision: int) -> Changed:
    at = Revision(revision)
    return Changed(KeyValue(*item, at, at, 1))


def test_a_store_that_went_back_voids_the_view() -> None:
    state = fresh()
    state.apply((Synced(Revision(9)),))
    with pytest.raises(Invalid, match="from revision 9 back to 3"):
        state.apply((changed(keys.node("n1"), 3),))


def test_a_listing_may_come_in_any_order_of_revisions() -> None:
    state = fresh()
    state.apply((changed(keys.node("n1"), 8),))
    state.apply((changed(keys.node("n2"), 3),))
    state.apply((Synced(Revision(9)),))
    assert state.synced
    assert state.revision == 9


def test_a_key_and_its_reference_are_each_others_inverse() -> None:
    for ref in (keys.ref("api"), keys.ref("all", "")):
        assert ref_of(object_key(ref)) == ref


@pytest.mark.parametrize(
    ("earlier", "later", "both"),
    [
        (([1], []), ([2], [1]), ([2], [])),
        (([], [1]), ([1], []), ([], [])),
        (([1], [2]), ([3], [4]), ([1, 3], [2, 4])),
    ],
)
def test_differences_one_after_the_other_are_one_difference(
    earlier: tuple[list[int], list[int]],
    later: tuple[list[int], list[int]],
    both: tuple[list[int], list[int]],
) -> None:
    one, two = (GroupChange(BitMap(a), BitMap(r)) for a, r in (earlier, later))
    assert compose(one, two) == GroupChange(BitMap(both[0]), BitMap(both[1]))


def test_a_group_sent_whole_needs_no_difference() -> None:
    group = GroupId(7)
    delta = {group: GroupChange(BitMap([1]), BitMap())}
    gathering = Gathering(Revision(3))
    gathering.add(ChangeSet(Revision(1), deltas=delta))
    gathering.add(ChangeSet(Revision(2), groups=frozenset({group})))
    gathering.add(ChangeSet(Revision(3), deltas=delta))
    merged = gathering.close()
    assert merged.groups == {group}
    assert merged.deltas == {}
    assert merged.merged == 3


def test_an_address_is_shown_while_its_identity_is_known() -> None:
    known = {WEB}
    addresses = Addresses(known.__contains__)
    addresses.announce("10.2.0.1", Announcement(WEB, "192.0.2.1", "shop", "web"))
    assert addresses.settle().different == {"10.2.0.1"}
    known.clear()
    addresses.identities_changed([WEB])
    assert addresses.settle().different == {"10.2.0.1"}
    assert addresses.rows == {}
    known.add(WEB)
    addresses.identities_changed([WEB])
    addresses.settle()
    assert addresses.rows.keys() == {"10.2.0.1"}


def test_an_address_announced_again_alike_is_no_change() -> None:
    addresses = Addresses(lambda _: True)
    for _ in range(2):
        addresses.announce("10.2.0.1", Announcement(WEB, "192.0.2.1", "shop", "web"))
        changes = addresses.settle()
    assert changes == Settled()


def test_who_is_found_where_follows_the_rows() -> None:
    addresses = Addresses(lambda _: True)
    addresses.announce("10.2.0.1", Announcement(WEB, "192.0.2.1", "shop", "web"))
    addresses.set_node("n1", ("192.0.2.1",))
    addresses.set_prefixes({"10.2.0.1/32": NumericIdentity(1 << 24 | 1)})
    settled = addresses.settle()
    pod, node = ip_network("10.2.0.1"), ip_network("192.0.2.1")
    assert sorted(settled.came) == [(HOST, node), (REMOTE_NODE, node), (WEB, pod)]
    addresses.withdraw("10.2.0.1")
    addresses.remove_node("n1")
    settled = addresses.settle()
    assert sorted(settled.went) == [(HOST, node), (REMOTE_NODE, node), (WEB, pod)]
    assert settled.came == []


async def test_the_first_change_goes_out_at_once_and_a_storm_in_rounds() -> None:
    state, clock = fresh(), FakeClock()
    distributor = Distributor(state)
    async with asyncio.TaskGroup() as group:
        task = group.create_task(distributor.pace(clock))
        with distributor.subscribed("n1", ()) as subscription:
            list(subscription.take())
            taken = []
            for revision in range(1, 11):
                distributor.publish(state.apply((changed(keys.node("n1"), revision),)))
                await clock.advance(0)
                taken.append(len(list(subscription.take())) if subscription.is_woken else 0)
            assert taken == [1] + [0] * 9
            await clock.advance(1)
            assert subscription.is_woken
            assert len(list(subscription.take())) == 1
            assert distributor.counts.coalesced == 8
        task.cancel()
