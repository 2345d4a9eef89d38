"""Pools and blocks: what is refused, what is lost at edges, how keys are ordered."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ipam import keys
from ipam.block import Block, Family, parse_block
from ipam.pool import PoolError, chosen, define, overlap
from ipam.ranges import around, merged, size, within, without
from ipam.view import View


def ip(text: str) -> int:
    return int(IPv4Address(text))


@pytest.mark.parametrize(
    ("cidrs", "size", "reserved", "words"),
    [
        ((), 26, (), "at least one CIDR"),
        (("10.0.0.0/33",), 26, (), "is not a CIDR"),
        (("::/80",), 26, (), "reaches into ::/96"),
        (("fd00::/124",), 26, (), "a block of /122 is larger than CIDR fd00::/124"),
        (("fd00::1/64",), 26, (), "did you mean fd00::/64"),
        (("ten",), 26, (), "is not a CIDR"),
        (("10.0.0.1/24",), 26, (), "host bits set; did you mean 10.0.0.0/24"),
        (("10.0.0.0/27",), 26, (), "a block of /26 is larger than CIDR 10.0.0.0/27"),
        (("10.0.0.0/16", "10.0.4.0/24"), 26, (), "10.0.0.0/16 and 10.0.4.0/24 overlap"),
        (("10.0.0.0/16",), 33, (), "block_size 33"),
        (("10.0.0.0/8",), 8, (), "block_size 8"),
        (("10.0.0.0/24",), 26, ("10.0.1.1/32",), "reserved 10.0.1.1/32 is outside"),
        (("10.0.0.0/30",), 30, ("10.0.0.0/30",), "no address is left"),
    ],
)
def test_a_wrong_definition_is_refused_with_its_reason(cidrs, size, reserved, words) -> None:
    with pytest.raises(PoolError) as caught:
        define("blue", cidrs, size, reserved)
    assert words in str(caught.value)
    assert str(caught.value).startswith("pool blue: ")


@pytest.mark.parametrize("name", ["", "Blue", "a/b", "-a", "a" * 64])
def test_a_name_that_cannot_be_a_key_is_refused(name: str) -> None:
    with pytest.raises(PoolError, match="a name is"):
        define(name, ["10.0.0.0/24"], 26)


def test_edges_are_lost_once_per_cidr() -> None:
    assert define("default", ["10.0.0.0/24", "10.1.0.0/25"], 26).capacity(Family.V4) == 254 + 126


def test_inner_blocks_give_all_their_addresses() -> None:
    pool = define("default", ["10.0.0.0/24"], 26)
    usable = [pool.usable(Block(ip("10.0.0.0") + 64 * i, 26)) for i in range(4)]
    assert usable == [63, 64, 64, 63]
    assert pool.capacity(Family.V4) == sum(usable) == 254
    for edge in ("10.0.0.0", "10.0.0.255"):
        assert pool.withheld(ip(edge)) == "an edge of 10.0.0.0/24"
    assert pool.withheld(ip("10.0.0.63")) is None


@pytest.mark.parametrize(("cidr", "capacity"), [("10.0.0.4/31", 2), ("10.0.0.4/32", 1)])
def test_the_smallest_cidrs_have_no_edges(cidr: str, capacity: int) -> None:
    assert define("p", [cidr], 32).capacity(Family.V4) == capacity


def test_reserved_addresses_are_not_usable() -> None:
    pool = define("p", ["10.0.0.0/24"], 26, ["10.0.0.1/32", "10.0.0.32/27"])
    assert pool.usable(parse_block("10.0.0.0/26")) == 64 - 1 - 1 - 32
    assert pool.capacity(Family.V4) == 254 - 33


def test_a_reserved_range_may_be_as_wide_as_it_likes() -> None:
    pool = define("p", ["10.0.0.0/8"], 26, ["10.0.0.0/9"])
    assert pool.capacity(Family.V4) == 2**23 - 1
    view = View()
    view.put_pool(pool)
    assert view.unclaimed("p", Family.V4, 0) == parse_block("10.128.0.0/26")


def test_ipv6_loses_its_first_address_only() -> None:
    pool = define("p", ["fd00::/120"])
    assert pool.capacity(Family.V6) == 255
    assert pool.withheld(int(IPv6Address("fd00::"))) == "an edge of fd00::/120"
    assert pool.withheld(int(IPv6Address("fd00::ff"))) is None


def test_a_disabled_range_hands_nothing_out_and_stays_the_pools() -> None:
    pool = define("p", ["10.0.0.0/24"], 26, disabled=["10.0.0.64/26"])
    assert pool.usable(parse_block("10.0.0.64/26")) == 0
    assert pool.owns(parse_block("10.0.0.64/26"))
    assert pool.withheld(ip("10.0.0.70")) == "in 10.0.0.64/26, which is disabled"


def test_a_pool_that_overlaps_another_is_named() -> None:
    a, b = define("a", ["10.0.0.0/16"], 26), define("b", ["10.0.8.0/24"], 26)
    assert "10.0.0.0/16 overlaps 10.0.8.0/24 of pool b" in (overlap(a, [a, b]) or "")
    assert overlap(a, [a, define("c", ["10.1.0.0/16"], 26)]) is None


addresses = st.integers(0, 2**32 - 1)
v6 = st.integers(2**32, 2**128 - 1)


@given(addresses, addresses)
def test_keys_order_as_addresses_do(a: int, b: int) -> None:
    assert (keys.address_key("p", a) < keys.address_key("p", b)) == (a < b)
    assert keys.parse_address_key(keys.address_key("p", a)) == ("p", a)
    assert keys.parse_address_key(keys.cool_key("p", a), keys.COOLING) == ("p", a)


@given(addresses, st.integers(20, 32), addresses)
def test_a_block_is_one_range_of_keys(base: int, size: int, other: int) -> None:
    block = Block(base >> (32 - size) << (32 - size), size)
    start, end = keys.address_range("p", block.base, block.last)
    assert (start <= keys.address_key("p", other) < end) == (other in block)
    assert keys.parse_block_key(keys.block_key("p", block)) == ("p", block)
    assert parse_block(str(block)) == block


@given(v6, v6)
def test_ipv6_keys_order_as_addresses_do_and_stay_clear_of_ipv4(a: int, b: int) -> None:
    assert (keys.address_key("p", a) < keys.address_key("p", b)) == (a < b)
    assert keys.parse_address_key(keys.address_key("p", a)) == ("p", a)
    start, end = keys.address_range("p", 0, 2**32 - 1)
    assert not start <= keys.address_key("p", a) < end


@given(v6, st.integers(64, 128), v6)
def test_an_ipv6_block_is_one_range_of_keys(base: int, size: int, other: int) -> None:
    block = Block(max(base >> (128 - size), 2**32) << (128 - size) & (2**128 - 1), size)
    assume(block.base >= 2**32)
    start, end = keys.address_range("p", block.base, block.last)
    assert (start <= keys.address_key("p", other) < end) == (other in block)
    assert keys.parse_block_key(keys.block_key("p", block)) == ("p", block)
    assert parse_block(str(block)) == block


spans = st.lists(
    st.tuples(st.integers(0, 60), st.integers(0, 9)).map(lambda t: (t[0], t[0] + t[1])), max_size=6
)


@given(spans, spans, st.integers(0, 70))
def test_ranges_are_the_sets_they_stand_for(some, others, probe: int) -> None:
    def members(pairs) -> set[int]:
        return {n for low, high in pairs for n in range(low, high + 1)}

    mine, theirs = merged(some), merged(others)
    assert members(mine) == members(some)
    assert size(mine) == len(members(some))
    assert (around(mine, probe) is not None) == (probe in members(some))
    assert members(without(mine, theirs)) == members(some) - members(others)
    assert members(within(mine, 10, 30)) == {n for n in members(some) if 10 <= n <= 30}
    assert all(high + 1 < low for (_, high), (low, _) in pairwise(mine))


@pytest.mark.parametrize(
    ("namespace", "named", "pool"),
    [
        ("shop", "", "a-exact"),
        ("shop-2", "", "pattern"),
        ("kube-system", "", "default"),
        ("shop", "pattern", "pattern"),
    ],
)
def test_the_pool_named_comes_before_the_namespaces_before_the_default(
    namespace: str, named: str, pool: str
) -> None:
    pools = [
        define("default", ["10.0.0.0/24"]),
        define("pattern", ["10.1.0.0/24"], namespaces=["shop*"]),
        define("a-exact", ["10.2.0.0/24"], namespaces=["shop"]),
    ]
    assert chosen(pools, namespace, named) == pool


@pytest.mark.parametrize("field", ["namespace", "name", "interface"])
@pytest.mark.parametrize("text", ["", "a/b", "x" * 254, "a\nb"])
def test_an_owner_that_cannot_be_a_key_says_why(field: str, text: str) -> None:
    parts = {"namespace": "shop", "name": "web", "interface": "eth0", field: text}
    assert field in (keys.Owner(**parts).problem() or "")
    assert keys.Owner("shop", "web", "eth0").problem() is None
