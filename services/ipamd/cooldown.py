"""Leases under which released addresses rest.

One lease serves the releases of a short span, so that releasing does not cost a grant each; an
address rests for the cool-down plus at most that span.
"""

from __future__ import annotations

import asyncio
import math

from services.runtime.clock import Clock
from services.store.model import LeaseId, Store

# etcd slows down when a lease with more keys than this ends.
MAX_KEYS = 1000


class CoolDown:
    def __init__(self, store: Store, clock: Clock, cooldown_s: float) -> None:
        self._store = store
        self._clock = clock
        self._cooldown_s = cooldown_s
        self._span_s = max(1.0, cooldown_s / 10)
        self._lease: LeaseId | None = None
        self._until_s = 0.0
        self._keys = 0
        self._granting: asyncio.Event | None = None

    async def lease(self) -> LeaseId | None:
        """For one released address; None when there is no cool-down."""
        if self._cooldown_s <= 0:
            return None
        while not self._usable():
            if self._granting is not None:
                await self._granting.wait()
            else:
                await self._grant()
        self._keys += 1
        return self._lease

    def forget(self, lease: LeaseId | None) -> None:
        """The store does not know the lease any more."""
        if lease == self._lease:
            self._lease = None

    def _usable(self) -> bool:
        return (
            self._lease is not None
            and self._keys < MAX_KEYS
            and self._clock.monotonic_s() < self._until_s
        )

    async def _grant(self) -> None:
        self._granting = granting = asyncio.Event()
        try:
            started_s = self._clock.monotonic_s()
            self._lease = await self._store.grant(math.ceil(self._cooldown_s + self._span_s))
            self._until_s, self._keys = started_s + self._span_s, 0
        finally:
            self._granting = None
            granting.set()
