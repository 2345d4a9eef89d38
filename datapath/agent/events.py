"""From the kernel's event ring to flows: drained in bulk, explained when read.

Draining moves records into a bounded ring and does nothing per record; who they were about and
which rule judged them is looked up when a reader asks. Readers of /v1/events share the ring, each
with its own position.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Literal, Protocol

from datapath.agent.addresses import dotted
from datapath.agent.record import EndpointRecord
from datapath.agent.view import View
from datapath.maps.layout import METRIC_LOST, Event, EventType, Metric, Verdict
from identity.numbers import NumericIdentity
from services.flows.filters import FlowFilter
from services.flows.flow import (
    Flow,
    Judge,
    Party,
    drop_reason_text,
    protocol_name,
    tcp_flags_text,
)
from services.flows.ring import RecordRing
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    RULE_DEFAULT_ALLOW,
    RULE_DEFAULT_DENY,
    RULE_NONE,
    RULE_OPEN,
    PolicyRef,
)
from services.runtime.clock import Clock

DRAIN_PAUSE_S = 0.05
# Per drain; what is left waits for the next, so that the loop is never held up for long.
DRAIN_LIMIT = 16384
KEPT = 16384

_ICMP = 1
_INGRESS = 1
_POLICY_DENIED = 133
_WORDS = {
    RULE_OPEN: "no policy selects the endpoint",
    RULE_ALLOW_LOCALHOST: "the node reaches its own endpoints",
    RULE_DEFAULT_ALLOW: "policies select the endpoint, all without default deny",
}


class Ring(Protocol):
    def drain(self, limit: int) -> list[Event]: ...
    def backlog(self) -> float: ...


class MetricTable(Protocol):
    def get(self, key: int) -> Metric | None: ...


class EventLog:
    def __init__(self, ring: Ring, metrics: MetricTable, clock: Clock, kept: int = KEPT) -> None:
        self._source = ring
        self._metrics = metrics
        self._clock = clock
        self.recent: RecordRing[Event] = RecordRing(kept)
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            full = self.drain() == DRAIN_LIMIT
            await self._clock.sleep(0 if full else DRAIN_PAUSE_S)

    def drain(self) -> int:
        events = self._source.drain(DRAIN_LIMIT)
        if events:
            # The kernel stamps with the monotonic clock.
            offset_s = self._clock.now_s() - self._clock.monotonic_s()
            self.recent.append(events, offset_s)
            self._arrived.set()
            self._arrived = asyncio.Event()
        return len(events)

    @property
    def lost(self) -> int:
        """Events the kernel had no room for, since the maps were made."""
        row = self._metrics.get(METRIC_LOST)
        return row.packets if row else 0

    @property
    def backlog(self) -> float:
        """Share of the kernel's ring that waits to be drained."""
        return self._source.backlog()

    async def more_than(self, seq: int) -> None:
        """Returns once a record with number `seq` exists."""
        while self.recent.next_seq <= seq:
            await self._arrived.wait()


class Explainer:
    """Names for numbers, as of now: what a record says in the words of policies and endpoints."""

    def __init__(
        self, view: View, records: Callable[[], Iterable[EndpointRecord]], node: str
    ) -> None:
        self._view = view
        self._records = records
        self._node = node

    def names(self) -> _Names:
        """A snapshot of the local names, for a run of records."""
        records = tuple(self._records())
        return _Names(
            view=self._view,
            by_id={record.id: record for record in records},
            by_address={record.address: record for record in records},
            node=self._node,
        )


class _Names:
    def __init__(
        self,
        *,
        view: View,
        by_id: Mapping[int, EndpointRecord],
        by_address: Mapping[int, EndpointRecord],
        node: str,
    ) -> None:
        self._view = view
        self._by_id = by_id
        self._by_address = by_address
        self._node = node

    def flow(self, event: Event, wall_offset_s: float) -> Flow:
        judge = self._by_id.get(event.endpoint)
        icmp = event.proto == _ICMP
        ingress = event.direction == _INGRESS
        seen_s = event.time_ns / 1e9 + wall_offset_s
        return Flow(
            time=datetime.fromtimestamp(seen_s, UTC).isoformat().replace("+00:00", "Z"),
            verdict="DROPPED" if event.type == EventType.DROP else _verdict(event.verdict),
            direction="INGRESS" if ingress else "EGRESS",
            source=self._party(event.saddr, 0 if icmp else event.sport, event.src_identity, event),
            destination=self._party(
                event.daddr, 0 if icmp else event.dport, event.dst_identity, event
            ),
            proto=protocol_name(event.proto),
            tcp_flags=tcp_flags_text(event.tcp_flags),
            drop_reason=event.reason,
            drop_reason_desc=drop_reason_text(event.reason),
            rule_id=event.rule_id,
            rule=self._rule(event, judge, ingress=ingress),
            endpoint=Judge(
                id=event.endpoint,
                identity=event.dst_identity if ingress else event.src_identity,
                namespace=judge.namespace if judge else "",
                name=judge.name if judge else "",
            ),
            icmp_type=event.sport if icmp else 0,
            icmp_code=event.dport if icmp else 0,
            length=event.length,
            node=self._node,
        )

    def _party(self, packed: bytes, port: int, identity: int, event: Event) -> Party:
        if event.family != 4:
            address = event.source if packed is event.saddr else event.destination
            return Party(str(address), port, identity)
        number = int.from_bytes(packed[:4], "big")
        ip = dotted(number)
        local = self._by_address.get(number)
        if local is not None:
            return Party(ip, port, identity, local.namespace, local.name)
        known = self._view.addresses.get(ip)
        if known is not None:
            return Party(ip, port, identity, known.namespace, known.name)
        return Party(ip, port, identity)

    def _rule(self, event: Event, judge: EndpointRecord | None, *, ingress: bool) -> str:
        if event.type == EventType.DROP and event.reason != _POLICY_DENIED:
            source = self._view.rule(event.rule_id)
            return str(source) if source else ""
        if event.rule_id in (RULE_NONE, RULE_DEFAULT_DENY):
            return self._default_deny(judge, ingress=ingress)
        if event.rule_id in _WORDS:
            return _WORDS[event.rule_id]  # type: ignore[index]  # NewType of int
        source = self._view.rule(event.rule_id)
        return str(source) if source else f"rule {event.rule_id}, no longer known"

    def _default_deny(self, judge: EndpointRecord | None, *, ingress: bool) -> str:
        identity = judge.identity if judge else NumericIdentity(0)
        policy = self._view.locals.get(identity)
        refs: tuple[PolicyRef, ...] = ()
        if policy is not None:
            refs = policy.ingress_policies if ingress else policy.egress_policies
        if not refs:
            return "default deny"
        return f"default deny: selected by {', '.join(map(str, refs))}"


def _verdict(verdict: int) -> Literal["FORWARDED", "REDIRECTED"]:
    return "REDIRECTED" if verdict == Verdict.REDIRECT else "FORWARDED"


def told(event: Event) -> bool:
    """Whether a record is a flow of its own. A refused packet has two: what the judge said, and
    the drop, which says all of it."""
    return event.type == EventType.DROP or event.verdict in (Verdict.ALLOW, Verdict.REDIRECT)


def last_flows(
    log: EventLog, explainer: Explainer, chosen: FlowFilter, count: int | None
) -> tuple[list[Flow], int]:
    """(the newest `count` flows that match, oldest first; the number of the next record).
    `count` None: all that are kept."""
    names, found = explainer.names(), []
    following = log.recent.next_seq
    if count == 0:
        return [], following
    for _, event, offset_s in log.recent.latest():
        if not told(event):
            continue
        flow = names.flow(event, offset_s)
        if chosen.matches(flow):
            found.append(flow)
            if len(found) == count:
                break
    return found[::-1], following


async def follow_flows(
    log: EventLog, explainer: Explainer, chosen: FlowFilter, seq: int
) -> AsyncIterator[tuple[list[Flow], int]]:
    """(matching flows, records missed) each time something arrives, from record `seq` on."""
    while True:
        await log.more_than(seq)
        missed = max(0, log.recent.first_seq - seq)
        names = explainer.names()
        flows = [
            flow
            for _, event, offset_s in log.recent.since(seq)
            if told(event) and chosen.matches(flow := names.flow(event, offset_s))
        ]
        seq = log.recent.next_seq
        yield flows, missed
