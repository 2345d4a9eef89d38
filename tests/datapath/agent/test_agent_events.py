from __future__ import annotations

import asyncio
from socket import htons

import pytest

from datapath.agent.events import EventLog, Explainer, follow_flows, last_flows
from datapath.agent.record import EndpointRecord, State
from datapath.agent.view import Address, Update, View
from datapath.maps.layout import METRIC_LOST, Event, Metric
from datapath.maps.ring import MemoryRing
from datapath.maps.tables import Tables
from services.flows.filters import FlowFilter, parse_filter
from services.flows.flow import decode_line, encode_line
from services.flows.ring import RecordRing
from services.policy.clauses import LocalPolicy, PolicyRef, RuleSource
from services.runtime.errors import Invalid
from tests.fakes.clock import FakeClock

WEB = PolicyRef("CiliumNetworkPolicy", "shop", "web")
RECORD = EndpointRecord(
    9, "shop", "web", (), "", "", "tes1", State.READY, identity=300, address=0x0A000002
)


def event(**changes: object) -> Event:
    made = Event(
        1_000_000_000, 9, 256, 300, 16, 60, htons(40000), htons(80),
        bytes([10, 0, 0, 1]) + bytes(12), bytes([10, 0, 0, 2]) + bytes(12),
        5, 0, 1, 1, 6, 2, 4, 2,
    )  # fmt: skip
    return made._replace(**changes)


def parts(*events: Event) -> tuple[EventLog, Explainer, MemoryRing]:
    view = View()
    view.apply(
        [
            Update(
                1,
                local_policies=(LocalPolicy(300, True, True, (), (WEB,), ()),),
                rules=(RuleSource(16, WEB, 0, "ingress[0]", 12),),
                addresses=(Address("10.0.0.1", 256, "n2", "shop", "client"),),
            )
        ]
    )
    ring = MemoryRing(events)
    log = EventLog(ring, Tables.memory().metrics, FakeClock())
    log.drain()
    return log, Explainer(view, lambda: (RECORD,), "n1"), ring


def flows(*events: Event, chosen: FlowFilter | None = None, count: int | None = None):
    log, explainer, _ = parts(*events)
    return last_flows(log, explainer, chosen or FlowFilter(), count)[0]


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
    log, explainer, ring = parts(event())
    log.recent = RecordRing(4)
    following = follow_flows(log, explainer, FlowFilter(), 0)
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


def test_lost_events_are_counted_by_the_kernel() -> None:
    tables = Tables.memory()
    tables.metrics.put_many({METRIC_LOST: Metric(5, 0)})
    assert EventLog(MemoryRing(), tables.metrics, FakeClock()).lost == 5


def test_a_ring_forgets_the_oldest_batches() -> None:
    ring: RecordRing[int] = RecordRing(5)
    for start in range(0, 12, 3):
        ring.append([start, start + 1, start + 2], 0.0)
    assert [n for _, n, _ in ring.since(0)] == [6, 7, 8, 9, 10, 11]
    assert [n for _, n, _ in ring.since(10)] == [10, 11]
    assert [n for _, n, _ in ring.latest()] == [11, 10, 9, 8, 7, 6]
    assert (ring.first_seq, ring.next_seq) == (6, 12)
