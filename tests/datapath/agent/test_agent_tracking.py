"""Flows that are over go, others stay, and the table's fill is known."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from datapath.agent import tracking as tracking_module
from datapath.agent.tracking import GRACE_S, Tracking
from datapath.maps.flows import CtEntry, CtFlags, CtKey, CtSide
from datapath.maps.layout import Verdict
from datapath.maps.tables import Sizes, Tables
from tests.fakes.clock import FakeClock

TCP, UDP, ICMP, ICMP6 = 6, 17, 1, 58
SIDE = CtSide(1, 1, 16, 0, Verdict.ALLOW)
BOTH = CtFlags.REPLY_SEEN
CLOSED = BOTH | CtFlags.FIN_FWD | CtFlags.FIN_REV


def key(number: int, proto: int) -> CtKey:
    return CtKey((number, 7), (1000, 80), proto)


def entry(idle_s: float, flags: CtFlags, now_s: float) -> CtEntry:
    return CtEntry(int((now_s - idle_s) * 1e9), (1, 1), (60, 60), flags, 5, 6, 0, SIDE, SIDE)


class Later(FakeClock):
    """The machine has been up for a day."""

    def monotonic_s(self) -> float:
        return super().monotonic_s() + 86_400


@pytest.mark.parametrize(
    ("proto", "flags", "lasts_s"),
    [
        (TCP, BOTH, 21_600),
        (TCP, BOTH | CtFlags.SYN_ONLY, 60),
        (TCP, CtFlags(0), 60),
        (TCP, CLOSED, 10),
        (TCP, BOTH | CtFlags.RST, 10),
        (TCP, BOTH | CtFlags.FIN_FWD, 21_600),
        (UDP, CtFlags(0), 60),
        (UDP, BOTH, 180),
        (ICMP, BOTH, 30),
        (ICMP6, CtFlags(0), 30),
    ],
)
async def test_a_flow_stays_as_long_as_the_programs_believe_in_it(
    proto: int, flags: CtFlags, lasts_s: float
) -> None:
    clock = Later()
    now_s = clock.monotonic_s()
    table = Tables.memory().ct
    alive, over = key(1, proto), key(2, proto)
    table.put_many(
        {
            alive: entry(lasts_s - 1, flags, now_s),
            over: entry(lasts_s + GRACE_S + 1, flags, now_s),
        }
    )
    tracking = Tracking(table, clock)
    await tracking.sweep()
    assert [found for found, _ in table.items()] == [alive]
    assert (tracking.entries, tracking.removed) == (1, 1)


async def test_of_many_flows_exactly_those_that_are_over_go() -> None:
    rng = random.Random(3)
    clock = Later()
    tables = Tables.memory(Sizes(ct_max=5000))
    idle = {key(number, UDP): rng.uniform(0, 400) for number in range(4000)}
    tables.ct.put_many({one: entry(s, BOTH, clock.monotonic_s()) for one, s in idle.items()})
    tracking = Tracking(tables.ct, clock)
    await tracking.sweep()
    left = {one for one, s in idle.items() if s <= 180 + GRACE_S}
    assert {found for found, _ in tables.ct.items()} == left
    assert tracking.fill == len(left) / 5000


def test_the_timeouts_are_those_of_the_programs() -> None:
    text = (Path(tracking_module.__file__).parents[1] / "bpf" / "conntrack.h").read_text()
    defined = {name: int(value) for name, value in re.findall(r"#define (\w+_S) (\d+)\n", text)}
    assert defined == {
        "TCP_ESTABLISHED_S": 21_600, "TCP_SYN_S": 60, "TCP_CLOSING_S": 10,
        "UDP_ONE_WAY_S": 60, "UDP_BOTH_WAYS_S": 180, "ICMP_S": 30,
    }  # fmt: skip
