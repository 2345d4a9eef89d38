"""Pools and blocks: what is refused, what is lost at edges, how keys are ordered."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam import keys
from ipam.block import Block, parse_block, pick
from ipam.pool import PoolError, define, overlap


def ip(text: str) -> int:
    return int(IPv4Address(text))


@pytest.mark.parametrize(
    ("cidrs", "size", "reserved", "words"),
    [
        ((), 26, (), "at least one CIDR"),
        (("10.0.0.0/33",), 26, (), "not an IPv4 CIDR"),
        (("fd00::/64",), 26, (), "not an IPv4 CIDR"),
        (("ten",), 26, (), "not an IPv4 CIDR"),
        (("10.0.0.1/24",), 26, (), "host bits set; did you mean 10.0.0.0/24"),
        (("10.0.0.0/27",), 26, (), "a block of /26 is larger than CIDR 10.0.0.0/27"),
        (("10.0.0.0/16", "10.0.4.0/24"), 26, (), "10.0.0.0/16 and 10.0.4.0/24 overlap"),
        (("10.0.0.0/16",), 33, (), "block_size 33"),
        (("10.0.0.0/8",), 8, (), "block_size 8"),
        (("10.0.0.0/24",), 26, ("10.0.1.1/32",), "reserved 10.0.1.1/32 is outside"),
        (("10.0.0.0/16",), 26, ("10.0.0.0/20",), "wider than 256 addresses"),
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
    assert define("default", ["10.0.0.0/24", "10.1.0.0/25"], 26).capacity == 254 + 126


def test_inner_blocks_give_all_their_addresses() -> None:
    pool = define("default", ["10.0.0.0/24"], 26)
    usable = [pool.usable(Block(ip("10.0.0.0") + 64 * i, 26)).bit_count() for i in range(4)]
    assert usable == [63, 64, 64, 63]
    assert pool.capacity == sum(usable) == 254
    assert not pool.usable(parse_block("10.0.0.0/26")) & 1
    assert not pool.usable(parse_block("10.0.0.192/26")) >> 63


@pytest.mark.parametrize(("cidr", "capacity"), [("10.0.0.4/31", 2), ("10.0.0.4/32", 1)])
def test_the_smallest_cidrs_have_no_edges(cidr: str, capacity: int) -> None:
    assert define("p", [cidr], 32).capacity == capacity


def test_reserved_addresses_are_not_usable() -> None:
    pool = define("p", ["10.0.0.0/24"], 26, ["10.0.0.1/32", "10.0.0.32/27"])
    assert pool.usable(parse_block("10.0.0.0/26")).bit_count() == 64 - 1 - 1 - 32
    assert pool.capacity == 254 - 33


def test_a_pool_that_overlaps_another_is_named() -> None:
    a, b = define("a", ["10.0.0.0/16"], 26), define("b", ["10.0.8.0/24"], 26)
    assert "10.0.0.0/16 overlaps 10.0.8.0/24 of pool b" in (overlap(a, [a, b]) or "")
    assert overlap(a, [a, define("c", ["10.1.0.0/16"], 26)]) is None


addresses = st.integers(0, 2**32 - 1)


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


@given(st.integers(1, 2**64 - 1), st.integers(0, 63))
def test_pick_finds_a_set_bit_at_or_after_the_spread(mask: int, spread: int) -> None:
    chosen = pick(mask, spread)
    assert mask >> chosen & 1
    after = [i for i in range(spread, 64) if mask >> i & 1]
    assert chosen == (after[0] if after else min(i for i in range(64) if mask >> i & 1))


@given(st.integers(0, 255), st.integers(0, 255))
def test_the_overlap_mask_marks_exactly_the_range(a: int, b: int) -> None:
    block, low, high = Block(64, 26), min(a, b), max(a, b)
    marked = {
        address for address in block.addresses() if block.overlap(low, high) & block.bit(address)
    }
    assert marked == set(range(low, high + 1)) & set(block.addresses())


@pytest.mark.parametrize("field", ["namespace", "name", "interface"])
@pytest.mark.parametrize("text", ["", "a/b", "x" * 254, "a\nb"])
def test_an_owner_that_cannot_be_a_key_says_why(field: str, text: str) -> None:
    parts = {"namespace": "shop", "name": "web", "interface": "eth0", field: text}
    assert field in (keys.Owner(**parts).problem() or "")
    assert keys.Owner("shop", "web", "eth0").problem() is None
