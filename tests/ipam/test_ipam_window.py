"""A node's own part of its blocks, as a log of events."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ipam.block import Family, parse_block
from ipam.keys import Owner, PoolRecord
from ipam.window import (
    Event,
    Freed,
    Gained,
    Gone,
    Heard,
    Holding,
    Local,
    Narrowed,
    Saved,
    Told,
    Took,
    Window,
)

POOLS = {
    "default": PoolRecord(cidrs=("10.0.0.0/24",), block_size=28, reserved=("10.0.0.20/32",)),
    "both": PoolRecord(cidrs=("10.1.0.0/24", "fd00::/64"), block_size=28, namespaces=("dual",)),
}
HEARD = Heard(POOLS, 100, 5, 0.0)


def owner(n: int, namespace: str = "shop", uid: str = "u") -> Owner:
    return Owner(namespace, f"w{n}", "eth0", uid)


def gained(block: str, size: int, pool: str = "default", taken=(), cooling=()) -> Gained:
    return Gained(pool, block, 1, size, tuple(taken), tuple(cooling), 0.0)


def local(*events: Event) -> Local:
    state = Local()
    for event in (HEARD, *events):
        state.apply(event)
    return state


def take(state: Local, n: int, now_s: float = 1.0, **named) -> Took:
    chosen = state.choose(owner(n, **named), "", (), now_s)
    assert isinstance(chosen, Took)
    state.apply(chosen)
    return chosen


def test_without_a_window_the_service_decides() -> None:
    assert local().choose(owner(1), "", (), 1.0) is None


def test_a_window_is_used_up_to_its_end_without_edges_and_reserved() -> None:
    state = local(gained("10.0.0.0/28", 4), gained("10.0.0.16/28", 8))
    ips = [take(state, n).ips[0] for n in range(3 + 7)]
    assert ips[:3] == ["10.0.0.1", "10.0.0.2", "10.0.0.3"]
    assert "10.0.0.20" not in ips
    assert len(set(ips)) == 10
    assert state.choose(owner(99), "", (), 1.0) is None


def test_both_families_or_none() -> None:
    state = local(gained("10.1.0.0/28", 8, "both"))
    assert state.choose(owner(1, "dual"), "", (), 1.0) is None
    state.apply(gained("fd00::40/122", 32, "both"))
    four, six = (ip_address(ip) for ip in take(state, 1, namespace="dual").ips)
    assert (four.version, six.version) == (4, 6)
    assert six in ip_network("fd00::40/122")


def test_ipv6_is_not_handed_out_in_order() -> None:
    state = local(gained("10.1.0.0/28", 16, "both"), gained("fd00::40/122", 32, "both"))
    sixes = [int(ip_address(take(state, n, namespace="dual").ips[1])) for n in range(12)]
    assert sixes != sorted(sixes)
    assert len(set(sixes)) == 12


def test_an_owner_that_asks_again_has_what_it_has() -> None:
    state = local(gained("10.0.0.16/28", 8))
    took = take(state, 1)
    again = state.choose(owner(1), "", (), 2.0)
    assert isinstance(again, Holding)
    assert again.addresses == (int(ip_address(took.ips[0])),)


def test_another_incarnation_of_an_owner_is_the_services_to_judge() -> None:
    state = local(gained("10.0.0.16/28", 8))
    take(state, 1)
    assert state.choose(owner(1, uid="later"), "", (), 2.0) is None


def test_a_released_address_rests_for_the_cool_down() -> None:
    state = local(gained("10.0.0.16/28", 1))
    first = take(state, 1)
    state.apply(Freed(owner(1), 10.0))
    assert state.choose(owner(2), "", (), 14.9) is None
    assert take(state, 2, 15.0).ips == first.ips


def test_a_static_address_is_given_when_it_is_in_a_window_and_free() -> None:
    state = local(gained("10.0.0.16/28", 8))
    wanted = [int(ip_address("10.0.0.18"))]
    chosen = state.choose(owner(1), "", wanted, 1.0)
    assert isinstance(chosen, Took)
    assert chosen.ips == ("10.0.0.18",)
    state.apply(chosen)
    assert state.choose(owner(2), "", wanted, 1.0) is None
    assert state.choose(owner(3), "", [int(ip_address("10.0.0.30"))], 1.0) is None


def test_a_node_that_may_be_taken_for_dead_hands_out_nothing_new() -> None:
    state = local(gained("10.0.0.16/28", 8))
    assert isinstance(state.choose(owner(1), "", (), 49.0), Took)
    assert state.choose(owner(1), "", (), 50.0) is None
    assert state.choose(owner(1), "", (), -1.0) is None


def test_a_window_asked_back_keeps_what_is_used_or_resting() -> None:
    state = local(gained("10.0.0.16/28", 8))
    for n in range(3):
        take(state, n)
    state.apply(Freed(owner(2), 10.0))
    window = next(iter(state.windows.values()))
    assert state.narrowest(window, 11.0) == 3
    assert state.narrowest(window, 20.0) == 2
    state.apply(Narrowed("default", "10.0.0.16/28", 2))
    assert state.choose(owner(9), "", (), 20.0) is None


def test_an_empty_window_goes_back_after_a_minute_when_others_have_room() -> None:
    empty = {}
    state = local(gained("10.0.0.16/28", 8))
    assert state.surplus(empty, 0.0) is None
    assert state.surplus(empty, 100.0) is None  # the last one stays
    state.apply(gained("10.0.0.32/28", 8))
    state.apply(gained("10.0.0.48/28", 8))
    assert state.surplus(empty, 110.0) is not None
    take(state, 1)
    left = {w.block for w in state.windows.values()} - {parse_block("10.0.0.16/28")}
    assert state.surplus(empty, 171.0) is None  # empty since then, as far as was seen
    spare = state.surplus(empty, 231.0)
    assert spare is not None
    assert spare.block in left


def test_a_pool_in_use_asks_for_windows_when_they_run_low() -> None:
    state = local()
    assert state.wishes(1.0) == [("default", Family.V4)]
    state.choose(owner(1, "dual"), "", (), 1.0)
    assert set(state.wishes(2.0)) == {
        ("default", Family.V4),
        ("both", Family.V4),
        ("both", Family.V6),
    }
    state.apply(gained("10.0.0.16/28", 16))
    assert ("default", Family.V4) not in state.wishes(2.0)


def test_what_the_store_knows_of_a_window_is_not_handed_out_again() -> None:
    known = (owner(7), "10.0.0.16")
    state = local(gained("10.0.0.16/28", 3, taken=[known], cooling=["10.0.0.17"]))
    assert take(state, 1).ips == ("10.0.0.18",)
    assert [entry.holding.owner for entry in state.pending] == [owner(1)]


steps = st.lists(
    st.tuples(
        st.sampled_from(["take", "take", "take", "free", "gain", "narrow", "gone", "told"]),
        st.integers(0, 7),
        st.integers(1, 16),
    ),
    max_size=60,
)


def events_of(todo) -> list[Event]:  # noqa: C901  one case per event
    """What a node does with its windows, asserting that it never hands an address out twice."""
    state, now_s, done = local(), 0.0, [HEARD]
    in_use: dict[str, str] = {}
    rested: dict[str, float] = {}

    def happen(event: Event) -> None:
        state.apply(event)
        done.append(event)

    for what, n, size in todo:
        now_s += 1.0
        block = f"10.0.0.{16 * n}/28"
        window = state.windows.get(("default", parse_block(block)))
        if what == "take":
            chosen = state.choose(owner(n), "", (), now_s)
            if isinstance(chosen, Took):
                (ip,) = chosen.ips
                assert ip not in in_use
                assert rested.get(ip, 0.0) <= now_s
                assert any(int(ip_address(ip)) in w for w in state.windows.values())
                in_use[ip] = chosen.owner.name
                happen(chosen)
        elif what == "free":
            for ip in [ip for ip, name in in_use.items() if name == f"w{n}"]:
                del in_use[ip]
                rested[ip] = now_s + 5
            happen(Freed(owner(n), now_s))
        elif what == "gain" and window is None:
            happen(gained(block, size))
        elif what == "narrow" and window is not None:
            happen(Narrowed("default", block, min(window.size, state.narrowest(window, now_s))))
        elif what == "gone" and window is not None and not state.narrowest(window, now_s):
            happen(Gone("default", block))
        elif what == "told" and state.pending:
            happen(Told(1 + size % len(state.pending)))
    return done


@given(steps, st.integers(0, 80))
def test_a_node_killed_at_any_event_goes_on_from_its_log(todo, cut: int) -> None:
    done = events_of(todo)[: cut + 1]
    state = Local()
    for event in done:
        state.apply(event)
    codec = msgspec.msgpack.Decoder(Event)
    reread = Local()
    for event in done:
        reread.apply(codec.decode(msgspec.msgpack.encode(event)))
    assert reread.saved() == state.saved()
    short = Local()
    short.apply(codec.decode(msgspec.msgpack.encode(state.saved())))
    assert isinstance(short.saved(), Saved)
    assert short.saved() == state.saved()
    assert short.used == state.used


@pytest.mark.parametrize("size", [1, 8, 16])
def test_a_window_is_a_run_of_addresses_from_its_blocks_first(size: int) -> None:
    window = Window("default", parse_block("10.0.0.16/28"), 1, size)
    inside = [n for n in range(10 << 24, (10 << 24) + 64) if n in window]
    assert inside == list(range((10 << 24) + 16, (10 << 24) + 16 + size))
