from __future__ import annotations

import asyncio
import mmap
import os
import random
import struct
from socket import htons

import pytest

from datapath.agent.events import EventLog
from datapath.agent.explain import Explainer
from datapath.agent.record import EndpointRecord, State
from datapath.agent.view import Address, Update, View
from datapath.maps.layout import METRIC_LOST, Event, Metric
from datapath.maps.ring import RECORD_SIZE, EventRing, MemoryRing, Records
from datapath.maps.tables import Tables
from services.flows.filters import FlowFilter, parse_filter
from services.flows.flow import Flow, decode_line, encode_line
from services.flows.ring import RecordRing
from services.policy.clauses import LocalPolicy, PolicyRef, RuleSource
from services.runtime.errors import Invalid
from tests.fakes.clock import FakeClock

WEB = PolicyRef("CiliumNetworkPolicy", "shop", "web")
RECORD = EndpointRecord(
    9, "shop", "web", (), "", "", "tes1", State.READY, identity=300, address=0x0A000002
)


BEGINNING = Update(
    1,
    local_policies=(LocalPolicy(300, True, True, (), (WEB,), ()),),
    rules=(RuleSource(16, WEB, 0, "ingress[0]", 12),),
    addresses=(Address("10.0.0.1", 256, "n2", "shop", "client"),),
)
RING_BYTES = 65536
MAPPED = bytes(10) + b"\xff\xff"
DENIED = {"type": 1, "reason": 133, "rule_id": 2, "verdict": 0}


def event(**changes: object) -> Event:
    made = Event(
        1_000_000_000, 9, 256, 300, 16, 0, 60, htons(40000), htons(80),
        MAPPED + bytes([10, 0, 0, 1]), MAPPED + bytes([10, 0, 0, 2]),
        5, 0, 1, 1, 6, 2, 4, 2, 0, 0, 0, 0,
    )  # fmt: skip
    return made._replace(**changes)


class Recorded:
    """A log over a ring, a view and one endpoint."""

    def __init__(self, *events: Event) -> None:
        self.view = View()
        self.view.apply([BEGINNING])
        self.records: tuple[EndpointRecord, ...] = (RECORD,)
        self.ring = MemoryRing(events)
        explainer = Explainer(self.view, lambda: self.records)
        metrics = Tables.memory().metrics
        self.log = EventLog(self.ring, metrics, explainer, FakeClock(), node="n1")
        self.log.drain()

    def change(self, update: Update) -> None:
        self.log.about_to_change()
        self.view.apply([update])

    def judged(self, made: Event) -> None:
        self.ring.put(made)

    def flows(self) -> list[Flow]:
        self.log.drain()
        return self.log.last_flows(FlowFilter(), None)[0]


class LeaptClock(FakeClock):
    """The wall clock was set an hour ahead."""

    def now_s(self) -> float:
        return super().now_s() + 3600


def flows(*events: Event, chosen: FlowFilter | None = None, count: int | None = None):
    return Recorded(*events).log.last_flows(chosen or FlowFilter(), count)[0]


def test_an_allowed_packet_names_both_ends_and_the_rule() -> None:
    (flow,) = flows(event())
    assert (flow.verdict, flow.direction, flow.proto) == ("FORWARDED", "INGRESS", "TCP")
    assert (flow.source.namespace, flow.source.name, flow.source.port) == ("shop", "client", 40000)
    assert (flow.destination.name, flow.destination.ip) == ("web", "10.0.0.2")
    assert flow.rule == "CiliumNetworkPolicy shop/web rule 0 ingress[0] line 12"
    assert flow.tcp_flags == "SYN"
    assert flow.time.startswith("2023-11-14T22:13:21")
    assert decode_line(encode_line(flow)) == flow


def test_a_refused_packet_is_one_flow_and_names_the_selecting_policies() -> None:
    (flow,) = flows(event(rule_id=2, verdict=0), event(type=1, reason=133, rule_id=2, verdict=0))
    assert flow.verdict == "DROPPED"
    assert flow.drop_reason_desc == "POLICY_DENIED"
    assert flow.rule == "default deny: selected by CiliumNetworkPolicy shop/web"


def test_an_open_endpoint_says_so() -> None:
    (flow,) = flows(event(rule_id=1))
    assert flow.rule == "no policy selects the endpoint"


def test_filters_choose_and_unknown_ones_are_named() -> None:
    drop = event(type=1, reason=181, verdict=2)
    assert len(flows(event(), drop, chosen=parse_filter({"verdict": "dropped"}))) == 1
    assert len(flows(event(), drop, chosen=parse_filter({"name": "client", "port": "40000"}))) == 2
    assert not flows(event(), chosen=parse_filter({"identity": "999"}))
    with pytest.raises(Invalid, match="colour"):
        parse_filter({"colour": "red"})
    with pytest.raises(Invalid, match="port"):
        parse_filter({"port": "http"})


def test_the_last_ones_are_the_newest_in_order() -> None:
    found = flows(*(event(length=n) for n in range(10)), count=3)
    assert [flow.length for flow in found] == [7, 8, 9]
    assert flows(event(), count=0) == []


async def test_a_follower_gets_what_arrives_and_hears_of_what_it_missed() -> None:
    recorded = Recorded(event())
    log, ring = recorded.log, recorded.ring
    log.recent = RecordRing(4)
    following = log.follow_flows(FlowFilter(), 0)
    async with asyncio.TaskGroup() as group:
        first = group.create_task(anext(following))
        await asyncio.sleep(0)
        ring.put(event(length=1))
        log.drain()
    assert [f.length for f in first.result()[0]] == [1]
    for length in range(2, 12):
        ring.put(event(length=length))
        log.drain()
    found, missed = await anext(following)
    assert (found[-1].length, missed) == (11, 6)
    await following.aclose()


def test_what_is_deleted_later_is_still_named_in_what_was_seen_before() -> None:
    recorded = Recorded()
    recorded.judged(event())
    recorded.judged(event(**DENIED))
    recorded.change(
        Update(
            2, local_policies_removed=(300,), rules_removed=(16,), addresses_removed=("10.0.0.1",)
        )
    )
    recorded.records = ()
    allowed, denied = recorded.flows()
    assert allowed.rule == "CiliumNetworkPolicy shop/web rule 0 ingress[0] line 12"
    assert denied.rule == "default deny: selected by CiliumNetworkPolicy shop/web"
    for flow in (allowed, denied):
        assert (flow.source.name, flow.destination.name, flow.endpoint.name) == (
            "client", "web", "web",
        )  # fmt: skip


def test_what_is_judged_by_another_policy_names_that_one() -> None:
    recorded = Recorded(event(**DENIED))
    other = PolicyRef("CiliumNetworkPolicy", "shop", "strict")
    recorded.change(Update(2, local_policies=(LocalPolicy(300, True, True, (), (other,), ()),)))
    recorded.judged(event(**DENIED))
    assert [flow.rule for flow in recorded.flows()] == [
        "default deny: selected by CiliumNetworkPolicy shop/web",
        "default deny: selected by CiliumNetworkPolicy shop/strict",
    ]


def test_a_rule_that_went_while_its_last_packets_were_judged_is_named() -> None:
    recorded = Recorded()
    recorded.change(Update(2, rules_removed=(16,)))
    recorded.judged(event())
    assert recorded.flows()[0].rule == "CiliumNetworkPolicy shop/web rule 0 ingress[0] line 12"


def test_an_address_that_has_a_new_owner_keeps_the_old_ones_name_in_history() -> None:
    recorded = Recorded(event())
    recorded.change(Update(2, addresses=(Address("10.0.0.1", 257, "n2", "shop", "next"),)))
    recorded.judged(event(src_identity=257))
    assert [flow.source.name for flow in recorded.flows()] == ["client", "next"]


def test_texts_are_shared_by_the_records_that_have_them() -> None:
    recorded = Recorded(*(event() for _ in range(3)))
    recorded.change(Update(2, addresses=(Address("10.0.0.7", 257, "n2"),)))
    recorded.judged(event())
    recorded.log.drain()
    assert len({id(each.rule) for _, each, _ in recorded.log.recent.latest()}) == 1


def test_many_records_are_explained_as_each_alone_would_be() -> None:
    rng = random.Random(7)
    recorded = Recorded()
    for _ in range(2000):
        recorded.judged(
            event(
                rule_id=rng.choice((1, 2, 16, 99)),
                endpoint=rng.choice((9, 10)),
                direction=rng.choice((1, 2)),
                saddr=bytes([10, 0, 0, rng.randrange(4)]) + bytes(12),
                daddr=bytes([10, 0, 0, rng.randrange(4)]) + bytes(12),
                type=rng.choice((1, 5)),
                reason=rng.choice((0, 132, 133)),
                verdict=rng.choice((0, 1, 2, 3)),
            )
        )
    alone = [flow for one in list(recorded.ring.waiting) for flow in flows(one)]
    assert recorded.flows() == alone
    assert len({flow.rule for flow in alone}) > 4


def test_the_ring_is_read_up_to_a_record_that_is_being_written_and_past_one_given_up() -> None:
    written = [event(length=number) for number in range(5)]
    memory = bytearray(Records.of(written).raw)
    memory[1 * RECORD_SIZE + 3] |= 0x40
    memory[3 * RECORD_SIZE + 3] |= 0x80
    fd = os.memfd_create("ring")
    os.truncate(fd, 2 * mmap.PAGESIZE + 2 * RING_BYTES)
    os.pwrite(fd, struct.pack("=Q", len(memory)), mmap.PAGESIZE)
    os.pwrite(fd, memory, 2 * mmap.PAGESIZE)
    ring = EventRing(fd, RING_BYTES)
    assert [one.length for one in ring.drain(100)] == [0, 2]
    assert not ring.drain(100)
    memory[3 * RECORD_SIZE + 3] = 0
    os.pwrite(fd, memory, 2 * mmap.PAGESIZE)
    assert [one.length for one in ring.drain(1)] == [3]
    assert [one.length for one in ring.drain(100)] == [4]
    assert ring.backlog() == 0
    ring.close()
    os.close(fd)


def test_a_jump_of_the_wall_clock_moves_only_what_is_drained_after_it() -> None:
    recorded = Recorded(event())
    recorded.log._clock = LeaptClock()
    recorded.judged(event())
    first, second = recorded.flows()
    assert first.time.startswith("2023-11-14T22:13:21")
    assert second.time.startswith("2023-11-14T23:13:21")


def test_lost_events_are_counted_by_the_kernel() -> None:
    tables = Tables.memory()
    tables.metrics.put_many({METRIC_LOST: Metric(5, 0)})
    explainer = Explainer(View(), tuple)
    assert EventLog(MemoryRing(), tables.metrics, explainer, FakeClock(), node="n1").lost == 5


def test_a_ring_forgets_the_oldest_batches() -> None:
    ring: RecordRing[int] = RecordRing(5)
    for start in range(0, 12, 3):
        ring.append([start, start + 1, start + 2], 0.0)
    assert [n for _, n, _ in ring.since(0)] == [6, 7, 8, 9, 10, 11]
    assert [n for _, n, _ in ring.since(10)] == [10, 11]
    assert [n for _, n, _ in ring.latest()] == [11, 10, 9, 8, 7, 6]
    assert (ring.first_seq, ring.next_seq) == (6, 12)
