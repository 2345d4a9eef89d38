"""From the kernel's event ring to flows: drained in bulk, explained by kind, spelled when read.

A drain also goes before everything that gives numbers another meaning (`about_to_change`): what was
judged until then is explained by what was in force. Readers of /v1/events share the records, each
with its own position; a flow is made of a record only for a reader.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Protocol

from datapath.agent.explain import Explained, Explainer, flow_of
from datapath.maps.layout import METRIC_LOST, Metric
from datapath.maps.ring import Records
from services.flows.filters import FlowFilter
from services.flows.flow import Flow
from services.flows.ring import RecordRing
from services.runtime.clock import Clock

DRAIN_PAUSE_S = 0.05
# Per drain, some 10 ms of it; what is left waits for the next, so that others have their turn.
DRAIN_LIMIT = 32768
KEPT = 16384


class Ring(Protocol):
    def drain(self, limit: int) -> Records: ...
    def backlog(self) -> float: ...


class MetricTable(Protocol):
    def get(self, key: int) -> Metric | None: ...


class EventLog:
    """`seen`: records drained, those included that are no flow of their own."""

    def __init__(
        self,
        ring: Ring,
        metrics: MetricTable,
        explainer: Explainer,
        clock: Clock,
        *,
        node: str,
        kept: int = KEPT,
    ) -> None:
        self._source = ring
        self._metrics = metrics
        self._explainer = explainer
        self._clock = clock
        self._node = node
        self.recent: RecordRing[Explained] = RecordRing(kept)
        self.seen = 0
        self._arrived = asyncio.Event()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            full = self.drain() == DRAIN_LIMIT
            await self._clock.sleep(0 if full else DRAIN_PAUSE_S)

    def drain(self) -> int:
        drained = self._source.drain(DRAIN_LIMIT)
        self.seen += len(drained)
        if drained and (flows := self._explainer.explain(drained)):
            # The kernel stamps with the monotonic clock.
            self.recent.append(flows, self._clock.now_s() - self._clock.monotonic_s())
            self._arrived.set()
            self._arrived = asyncio.Event()
        return len(drained)

    def about_to_change(self) -> None:
        """Call before a rule, a policy, an address or an endpoint goes. Under a flood, what is
        beyond one drain is explained by what is in force afterwards."""
        self.drain()

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

    def last_flows(self, chosen: FlowFilter, count: int | None) -> tuple[list[Flow], int]:
        """(the newest `count` flows that match, oldest first; the number of the next record).
        `count` None: all that are kept."""
        found: list[Flow] = []
        following = self.recent.next_seq
        if count == 0:
            return [], following
        for _, record, offset_s in self.recent.latest():
            flow = flow_of(record, offset_s, self._node)
            if chosen.matches(flow):
                found.append(flow)
                if len(found) == count:
                    break
        return found[::-1], following

    async def follow_flows(
        self, chosen: FlowFilter, seq: int
    ) -> AsyncIterator[tuple[list[Flow], int]]:
        """(matching flows, records missed) each time something arrives, from record `seq` on."""
        while True:
            await self.more_than(seq)
            missed = max(0, self.recent.first_seq - seq)
            flows = [
                flow
                for _, record, offset_s in self.recent.since(seq)
                if chosen.matches(flow := flow_of(record, offset_s, self._node))
            ]
            seq = self.recent.next_seq
            yield flows, missed
