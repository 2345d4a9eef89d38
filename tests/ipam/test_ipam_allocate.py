"""Decisions from a view, without a store."""

from __future__ import annotations

from ipaddress import IPv4Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam import reclaim
from ipam.allocate import Claim, Decision, Full, Held, Pick, Refused, Request, Take, Why, decide
from ipam.block import Block, Family, parse_block
from ipam.keys import Owner
from ipam.pool import define
from ipam.view import Assigned, Claimed, View

POOL = define("default", ["10.0.0.0/28"], 30)  # 4 blocks of 4; 14 addresses


def ip(text: str) -> int:
    return int(IPv4Address(text))


def owner(n: int, uid: str = "") -> Owner:
    return Owner("shop", f"web-{n}", "eth0", uid)


def ask(node: str = "a", n: int = 0, *, wanted: str = "", uid: str = "") -> Request:
    return Request(node, owner(n, uid), "default", (ip(wanted),) if wanted else ())


def taken(decision: Decision) -> tuple[Pick, ...]:
    assert isinstance(decision, Take)
    return decision.picks


def give_block(view: View, text: str, node: str) -> Block:
    block = parse_block(text)
    view.put_block(claimed(block, node, f"{node}@{text}".encode()))
    return block


def claimed(block: Block, node: str, value: bytes = b"x", rev: int = 1, window: int = 0) -> Claimed:
    return Claimed("default", block, node, value, rev, window)


def give_address(view: View, text: str, n: int, node: str = "a", uid: str = "") -> Assigned:
    pool = view.pool("default") or POOL
    block = pool.block_of(ip(text))
    assert block is not None
    row = Assigned("default", ip(text), block, node, owner(n, uid), 5)
    view.put_address(row)
    return row


@pytest.fixture
def view() -> View:
    fresh = View()
    fresh.put_pool(POOL)
    return fresh


def test_a_node_without_a_block_claims_one(view: View) -> None:
    assert decide(view, ask()) == Claim(parse_block("10.0.0.0/30"))


def test_the_first_address_of_the_own_block_that_is_not_an_edge(view: View) -> None:
    give_block(view, "10.0.0.0/30", "a")
    (pick,) = taken(decide(view, ask()))
    assert pick.address == ip("10.0.0.1")
    assert pick.claim.value == b"a@10.0.0.0/30"


def test_spread_moves_the_choice_within_the_block(view: View) -> None:
    give_block(view, "10.0.0.4/30", "a")
    chosen = {taken(decide(view, ask(), (), spread))[0].address for spread in range(4)}
    assert chosen == set(range(ip("10.0.0.4"), ip("10.0.0.8")))


def test_an_own_block_comes_before_a_fresh_one(view: View) -> None:
    give_block(view, "10.0.0.12/30", "a")
    give_block(view, "10.0.0.0/30", "b")
    assert str(taken(decide(view, ask()))[0].claim.block) == "10.0.0.12/30"


def test_a_full_own_block_makes_the_node_claim_another(view: View) -> None:
    give_block(view, "10.0.0.0/30", "a")
    for i in (1, 2, 3):
        give_address(view, f"10.0.0.{i}", i)
    assert decide(view, ask()) == Claim(parse_block("10.0.0.4/30"))


def test_held_and_cooling_addresses_are_passed_over(view: View) -> None:
    block = give_block(view, "10.0.0.4/30", "a")
    view.hold("default", block, ip("10.0.0.4"))
    view.put_cooling("default", ip("10.0.0.5"), block)
    assert taken(decide(view, ask()))[0].address == ip("10.0.0.6")
    view.drop("default", block, ip("10.0.0.4"))
    assert taken(decide(view, ask()))[0].address == ip("10.0.0.4")


def test_a_block_that_is_being_claimed_is_passed_over(view: View) -> None:
    view.hold_block("default", parse_block("10.0.0.0/30"))
    assert decide(view, ask()) == Claim(parse_block("10.0.0.4/30"))


def test_without_free_blocks_the_roomiest_foreign_block_lends(view: View) -> None:
    for text in ("10.0.0.0/30", "10.0.0.4/30", "10.0.0.8/30", "10.0.0.12/30"):
        give_block(view, text, "b")
    for i, text in enumerate(("10.0.0.4", "10.0.0.5"), 1):
        give_address(view, text, i, "b")
    (pick,) = taken(decide(view, ask()))
    assert str(pick.claim.block) == "10.0.0.8/30"
    assert pick.claim.node == "b"


def test_an_exhausted_pool_says_what_to_do(view: View) -> None:
    for text in ("10.0.0.0/30", "10.0.0.4/30", "10.0.0.8/30", "10.0.0.12/30"):
        give_block(view, text, "b")
    for i in range(1, 14):
        give_address(view, f"10.0.0.{i}", i, "b")
    view.put_cooling("default", ip("10.0.0.14"), parse_block("10.0.0.12/30"))
    decision = decide(view, ask())
    assert isinstance(decision, Full)
    assert str(decision) == (
        "pool default (10.0.0.0/28) is exhausted: 13 of 14 addresses in use, 1 free again within"
        " the cool-down; release endpoints or add a CIDR to pool default"
    )


def test_an_owner_that_asks_again_is_given_what_it_has(view: View) -> None:
    give_block(view, "10.0.0.0/30", "a")
    row = give_address(view, "10.0.0.2", 0, uid="u1")
    assert decide(view, ask(uid="u1"), (row,)) == Held((row,))
    assert decide(view, ask(), (row,)) == Held((row,))
    assert decide(view, ask(wanted="10.0.0.2"), (row,)) == Held((row,))


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (ask(uid="u2"), "has 10.0.0.2 under uid u1"),
        (ask(node="b"), "has 10.0.0.2 on node a"),
        (ask(wanted="10.0.0.3"), "has 10.0.0.2 of pool default"),
    ],
)
def test_another_claim_on_the_same_owner_is_refused(view: View, request_, words) -> None:
    give_block(view, "10.0.0.0/30", "a")
    row = give_address(view, "10.0.0.2", 0, uid="u1")
    decision = decide(view, request_, (row,))
    assert isinstance(decision, Refused)
    assert decision.why is Why.TAKEN
    assert words in decision.message


@pytest.mark.parametrize(
    ("wanted", "why", "words"),
    [
        ("10.0.0.0", Why.NOT_USABLE, "an edge of 10.0.0.0/28"),
        ("10.0.0.15", Why.NOT_USABLE, "an edge of 10.0.0.0/28"),
        ("10.0.0.3", Why.NOT_USABLE, "reserved"),
        ("10.0.1.1", Why.NOT_USABLE, "outside pool default (10.0.0.0/28)"),
        ("10.0.0.5", Why.TAKEN, "belongs to shop/web-1 eth0 on node b"),
        ("10.0.0.6", Why.COOLING, "released a moment ago"),
        ("10.0.0.7", Why.COOLING, "being handed out"),
    ],
)
def test_a_static_address_that_cannot_be_had_says_why(wanted, why, words) -> None:
    view = View()
    view.put_pool(define("default", ["10.0.0.0/28"], 30, ["10.0.0.3/32"]))
    block = give_block(view, "10.0.0.4/30", "b")
    give_address(view, "10.0.0.5", 1, "b")
    view.put_cooling("default", ip("10.0.0.6"), block)
    view.hold("default", block, ip("10.0.0.7"))
    decision = decide(view, ask(wanted=wanted))
    assert isinstance(decision, Refused)
    assert decision.why is why
    assert words in decision.message


def test_a_static_address_claims_its_block_or_borrows_from_it(view: View) -> None:
    assert decide(view, ask(wanted="10.0.0.9")) == Claim(parse_block("10.0.0.8/30"))
    give_block(view, "10.0.0.8/30", "b")
    (pick,) = taken(decide(view, ask(wanted="10.0.0.9")))
    assert (pick.address, pick.claim.node) == (ip("10.0.0.9"), "b")


def test_an_unknown_pool_lists_the_known_ones() -> None:
    view = View()
    view.put_pool(define("blue", ["10.0.0.0/28"], 30))
    decision = decide(view, ask())
    assert decision == Refused(Why.UNKNOWN_POOL, "no pool 'default'; known: blue")


def test_a_block_without_a_usable_address_is_never_claimed() -> None:
    view = View()
    view.put_pool(define("default", ["10.0.0.0/30"], 32, ["10.0.0.1/32"]))
    assert decide(view, ask()) == Claim(parse_block("10.0.0.2/32"))
    give_block(view, "10.0.0.2/32", "a")
    give_address(view, "10.0.0.2", 7)
    assert isinstance(decide(view, ask()), Full)


def test_a_pool_redefined_forgets_neither_blocks_nor_addresses(view: View) -> None:
    give_block(view, "10.0.0.0/30", "a")
    give_address(view, "10.0.0.1", 1)
    view.put_pool(define("default", ["10.0.0.0/28", "10.0.1.0/28"], 30), 9)
    assert view.used("default") == 1
    assert decide(view, ask("b")) == Claim(parse_block("10.0.0.4/30"))


def test_an_older_row_does_not_replace_a_newer_one(view: View) -> None:
    block = parse_block("10.0.0.0/30")
    view.put_block(claimed(block, "b", b"new", 9))
    view.put_block(claimed(block, "a", b"old", 3))
    view.remove_block("default", block, 4)
    claim = view.claim_of("default", block)
    assert claim is not None
    assert (claim.node, claim.value) == ("b", b"new")


# ------------------------------------------------------------------ reclaim


def test_a_block_empty_for_a_minute_goes_back(view: View) -> None:
    block = give_block(view, "10.0.0.0/30", "a")
    first = reclaim.decide(view, {}, 100.0)
    assert first.give_back == ()
    early = reclaim.decide(view, first.empty_since, 159.0)
    assert early.give_back == ()
    late = reclaim.decide(view, early.empty_since, 160.0)
    assert [c.block for c in late.give_back] == [block]


def test_use_in_between_starts_the_minute_anew(view: View) -> None:
    give_block(view, "10.0.0.0/30", "a")
    first = reclaim.decide(view, {}, 100.0)
    give_address(view, "10.0.0.1", 1)
    used = reclaim.decide(view, first.empty_since, 130.0)
    view.remove_address("default", ip("10.0.0.1"), 6)
    again = reclaim.decide(view, used.empty_since, 161.0)
    assert again.give_back == ()


def test_a_block_about_to_be_used_stays(view: View) -> None:
    block = give_block(view, "10.0.0.0/30", "a")
    since = reclaim.decide(view, {}, 0.0).empty_since
    view.hold("default", block, ip("10.0.0.1"))
    assert reclaim.decide(view, since, 999.0).give_back == ()


def test_an_empty_block_outside_its_pool_goes_back_at_once(view: View) -> None:
    block = give_block(view, "10.9.0.0/30", "a")
    assert [c.block for c in reclaim.decide(view, {}, 0.0).give_back] == [block]


# ------------------------------------------------------------------ any sequence


@given(
    st.integers(26, 30),
    st.integers(28, 32),
    st.lists(st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 99)), max_size=80),
)
def test_no_address_is_handed_out_twice_and_none_is_wasted(size, block_size, steps) -> None:
    """Decisions applied to the view as they fall, releases in between."""
    pool = define("default", [f"10.0.0.0/{size}"], max(size, block_size))
    view, revision, live = View(), 1, {}
    view.put_pool(pool)
    for n, (node, releasing, pick) in enumerate(steps):
        revision += 1
        if releasing and live:
            address = sorted(live)[pick % len(live)]
            view.remove_address("default", address, revision)
            del live[address]
            continue
        decision = decide(view, ask(node, n), (), pick)
        if isinstance(decision, Claim):
            view.put_block(claimed(decision.block, node, rev=revision))
            decision = decide(view, ask(node, n), (), pick)
        if isinstance(decision, Full):
            assert len(live) == pool.capacity(Family.V4)
            continue
        (chosen,) = taken(decision)
        assert chosen.address not in live
        assert pool.withheld(chosen.address) is None
        live[chosen.address] = n
        view.put_address(
            Assigned("default", chosen.address, chosen.claim.block, node, owner(n), revision)
        )
    assert view.used("default") == len(live)
