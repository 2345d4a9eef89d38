"""The one watch of policyd, and who waits for what it sees.

Store.watch --batch--> State.apply --change-set--> Distributor.publish --> subscriptions
                                              +--> pulse --> reached(), WaitRealised
"""

from __future__ import annotations

import asyncio
from contextlib import nullcontext
from typing import Protocol

from services.policyd.change import ChangeSet
from services.policyd.nodes import Nodes, Pulse
from services.policyd.state import PREFIXES, State
from services.runtime import garbage, metrics
from services.runtime.clock import Clock
from services.runtime.errors import Retry
from services.runtime.log import logger
from services.store.model import Store

log = logger(__name__)

_resolve_seconds = metrics.meter("tessera.policyd").create_histogram(
    "tessera_policyd_resolve_seconds", unit="s", description="From a batch to its change-set"
)


class Publisher(Protocol):
    def publish(self, change: ChangeSet) -> None: ...


class View:
    def __init__(
        self, state: State, publisher: Publisher, nodes: Nodes, pulse: Pulse, clock: Clock
    ) -> None:
        self._state = state
        self._publisher = publisher
        self._nodes = nodes
        self._pulse = pulse
        self._clock = clock

    async def follow(self, store: Store) -> None:
        """Until cancelled. Raises `Retry` when the store was closed and `Invalid` when it was
        replaced; everything that was built on this view is void then."""
        async for events in store.watch(*PREFIXES):
            started_s = self._clock.monotonic_s()
            listing = not self._state.synced
            with garbage.building() if listing else nullcontext():
                change = self._state.apply(events)
            took_s = self._clock.monotonic_s() - started_s
            self._publisher.publish(change)
            # The streams first: all that follows can wait, and the nodes do.
            await asyncio.sleep(0)
            self._state.tell()
            self._nodes.forget_all_but(self._state.addresses.nodes)
            self._pulse.beat()
            _resolve_seconds.record(took_s)
            if listing and self._state.synced:
                log.info("policyd.synced", revision=change.revision, took_s=round(took_s, 3))
        raise Retry("the store was closed while policyd watched it")

    async def synced(self) -> None:
        while not self._state.synced:
            await self._pulse.wait()

    async def reached(self, revision: int) -> None:
        while self._state.revision < revision:
            await self._pulse.wait()
