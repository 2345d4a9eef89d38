from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address

import pytest
from pyroaring import BitMap

from datapath.agent import checkpoint
from datapath.agent.addresses import address_ops, parse_cidr
from datapath.agent.view import (
    Address,
    AddressColumns,
    GroupChange,
    GroupDelta,
    OutOfStep,
    Update,
    View,
)
from datapath.maps.layout import Prefix4, Prefix6, mapped
from services.policy.clauses import LocalPolicy, PolicyRef, RuleSource

ONE = LocalPolicy(300, True, True, (), (), ())


def test_messages_with_more_are_one_change() -> None:
    view = View()
    change = view.apply(
        [
            Update(5, more=True, groups=((1, BitMap([7])),)),
            Update(5, group_deltas=(GroupDelta(1, BitMap([8]), BitMap([7])),)),
        ]
    )
    assert change.groups == {1: GroupChange(BitMap([8]), BitMap())}
    assert view.revision == 5


def test_a_snapshot_of_what_is_held_changes_nothing() -> None:
    view = View()
    full = Update(
        1,
        snapshot=True,
        groups=((1, BitMap([7])),),
        local_policies=(ONE,),
        addresses=(Address("10.0.0.1", 7),),
    )
    assert view.apply([full])
    assert not view.apply([full])


def test_a_snapshot_drops_what_it_does_not_name() -> None:
    view = View()
    view.apply([Update(1, groups=((1, BitMap([7])),), addresses=(Address("10.0.0.1", 7),))])
    change = view.apply([Update(2, snapshot=True, local_policies=(ONE,))])
    assert change.groups == {1: GroupChange(BitMap(), BitMap([7]))}
    assert [a.cidr for a in change.addresses_removed] == ["10.0.0.1"]
    assert change.locals == {300}


def test_set_and_taken_back_in_one_batch_is_no_change() -> None:
    view = View()
    batch = [Update(1, addresses=(Address("10.0.0.1", 7),), addresses_removed=("10.0.0.1",))]
    assert not view.apply(batch)


def test_a_rule_taken_back_is_still_named() -> None:
    view = View()
    rule = RuleSource(16, PolicyRef("K", "n", "p"), 0, "ingress[0]", 3)
    view.apply([Update(1, rules=(rule,))])
    assert view.apply([Update(2, rules_removed=(16,))]).rules
    assert view.rule(16) == rule
    assert 16 not in view.rules


def test_prefixes_lose_their_host_bits_and_addresses_are_of_either_family() -> None:
    assert parse_cidr("10.1.2.3/8") == Prefix4(8, 0x0A000000)
    assert parse_cidr("0.0.0.0/0") == Prefix4(0, 0)
    assert parse_cidr("10.0.0.1") == mapped(IPv4Address("10.0.0.1"))
    assert parse_cidr("fd00::1") == int(IPv6Address("fd00::1"))
    assert parse_cidr("fd00::1/8") == Prefix6(8, 0xFD << 120)
    assert parse_cidr("localhost") is None


def test_addresses_of_this_node_come_from_its_own_endpoints_alone() -> None:
    put = (Address("10.0.0.1", 7, "n1"), Address("10.0.0.2", 7, "n2"), Address("10.0.0.3", 7, "n2"))
    ops = address_ops(put, ("10.0.0.3",), local={mapped(IPv4Address("10.0.0.3"))}, own_nodes={"n1"})
    assert ops.ipcache == {0x0A000002: 7}
    assert ops.ipcache_removed == [0x0A000001]


def test_a_snapshot_with_another_digest_is_taken_when_it_comes_twice() -> None:
    view = View()
    strange = Update(1, snapshot=True, addresses=(Address("10.0.0.1", 7),), addresses_digest=1)
    with pytest.raises(OutOfStep, match="addresses of revision 1"):
        view.apply([strange])
    change = view.apply([strange])
    assert [a.cidr for a in change.addresses_put] == ["10.0.0.1"]


def test_what_leads_on_from_elsewhere_changes_nothing_until_all_is_told() -> None:
    view = View()
    view.apply([Update(5, snapshot=True, addresses=(Address("10.0.0.1", 7),))])
    with pytest.raises(OutOfStep, match="leads on from revision 6; 5 is held"):
        view.apply([Update(7, after=6, addresses=(Address("10.0.0.2", 7),))])
    with pytest.raises(OutOfStep, match="has not come yet"):
        view.apply([Update(8, after=7)])
    assert view.addresses.keys() == {"10.0.0.1"}
    change = view.apply([Update(8, resumed=True, addresses=(Address("10.0.0.2", 8),))])
    assert [a.cidr for a in change.addresses_put] == ["10.0.0.2"]
    assert view.revision == 8


def test_what_was_applied_with_a_wrong_digest_shows_in_the_change_that_mends_it() -> None:
    view = View()
    view.apply([Update(5, snapshot=True)])
    with pytest.raises(OutOfStep):
        view.apply([Update(6, after=5, addresses=(Address("10.0.0.1", 9),), addresses_digest=1)])
    change = view.apply([Update(6, resumed=True, addresses=(Address("10.0.0.1", 7),))])
    assert [a.identity for a in change.addresses_put] == [7]
    assert not view.apply([Update(6, after=5, addresses=(Address("10.0.0.1", 9),))]), "repeated"


def test_a_view_of_a_checkpoint_says_the_same_of_itself() -> None:
    view = View()
    rule = RuleSource(16, PolicyRef("K", "n", "p"), 0, "ingress[0]", 3)
    addresses = tuple(Address(f"10.0.0.{n}", 7) for n in range(200))
    view.apply([Update(1, snapshot=True, groups=((1, BitMap([7])),), rules=(rule,), instance="i")])
    view.apply([Update(2, addresses=addresses, columns=AddressColumns.of(addresses))])
    view.apply([Update(3, local_policies=(ONE,), addresses_removed=("10.0.0.9",))])
    assert checkpoint.unpack_view(checkpoint.pack_view(view)).holding() == view.holding()
