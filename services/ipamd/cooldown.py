"""Leases under which released addresses rest.

One lease serves the releases of a short span, so that releasing does not cost a grant each; an
address rests for the cool-down plus at most that span. Pools may have a cool-down of their own, so
there is a current lease per duration.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass

from services.runtime.clock import Clock
from services.store.model import LeaseId, Store

# etcd slows down when a lease with more keys than this ends.
MAX_KEYS = 1000


class CoolDown:
    """`default_s`: of pools that do not say."""

    def __init__(self, store: Store, clock: Clock, default_s: int) -> None:
        self._store = store
        self._clock = clock
        self._default_s = default_s
        self._spans: dict[int, _Span] = {}

    async def lease(self, cooldown_s: int | None = None) -> LeaseId | None:
        """For one allocation that is released; None when there is no cool-down."""
        seconds = self._default_s if cooldown_s is None else cooldown_s
        if seconds <= 0:
            return None
        span = self._spans.setdefault(seconds, _Span(seconds))
        while not span.usable(self._clock.monotonic_s()):
            if span.granting is not None:
                await span.granting.wait()
            else:
                await self._grant(span)
        span.keys += 2  # one address of each family
        return span.lease

    def forget(self, lease: LeaseId | None) -> None:
        """The store does not know the lease any more."""
        for span in self._spans.values():
            if span.lease == lease:
                span.lease = None

    async def _grant(self, span: _Span) -> None:
        span.granting = granting = asyncio.Event()
        try:
            started_s = self._clock.monotonic_s()
            span.lease = await self._store.grant(math.ceil(span.seconds + span.length_s))
            span.until_s, span.keys = started_s + span.length_s, 0
        finally:
            span.granting = None
            granting.set()


@dataclass(slots=True)
class _Span:
    """The time in which releases share one lease."""

    seconds: int
    lease: LeaseId | None = None
    until_s: float = 0.0
    keys: int = 0
    granting: asyncio.Event | None = None

    @property
    def length_s(self) -> float:
        return max(1.0, self.seconds / 10)

    def usable(self, now_s: float) -> bool:
        return self.lease is not None and self.keys < MAX_KEYS and now_s < self.until_s
