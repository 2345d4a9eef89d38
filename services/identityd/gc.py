"""Collecting identities that nothing uses.

    watch: last reference gone ──► idle since t ──► t + grace ──► collect transaction
                                                                   │ still unused? unchanged?
                                        quarantine, leased ◄───────┘

No leader and no locks: every replica collects, the transactions decide, and losing is harmless. The
grace begins when this process *saw* the last reference go, so a replica that just started waits
longest. What looks like a failure of nodes or of the store, rather than workloads ending, suspends
collecting for one session lifetime, in which nodes return and renew their references.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from identity.numbers import NumericIdentity
from services.identityd.stats import Counts
from services.identityd.txns import Collectable, collect
from services.identityd.view import IdentityView
from services.runtime.clock import Clock
from services.runtime.errors import NotFound, Retry
from services.runtime.log import logger
from services.store.model import NO_LEASE, LeaseId, Store, Txn, TxnResult

log = logger(__name__)

# Transactions nested in one; 64 and the widest of them, 3, stay below the store's limit of 128.
BATCH: Final = 64
# Tombstones of this span share a lease, which outlives the quarantine by as much; a lease with
# many keys is slow to revoke.
TOMB_SPAN_S: Final = 30.0
TOMBS_PER_LEASE: Final = 1000
# With this share of the numbers taken, waiting for the whole grace risks exhaustion.
PRESSURE: Final = 0.8
PRESSED_GRACE_S: Final = 30.0
# Idle numbers are looked at this often at least, since pressure may shorten their grace.
LONGEST_SLEEP_S: Final = 15.0
# Numbers that become idle one after another are collected together.
SHORTEST_SLEEP_S: Final = 0.1
# References lost within the span: above the share, a failure is likelier than a scale-down.
LOSS_SPAN_S: Final = 60.0
LOSS_SHARE: Final = 0.2
FEW_REFERENCES: Final = 50
# Replicas see the same event at the same time; this spreads their attempts.
JITTER_SHARE: Final = 0.05


@dataclass(slots=True)
class _Losses:
    """Counts vanished references per span."""

    span_began_s: float
    released_then: int

    def alarming(self, released: int, held: int, now_s: float) -> bool:
        lost = released - self.released_then
        if now_s - self.span_began_s > LOSS_SPAN_S:
            self.span_began_s, self.released_then = now_s, released
        return lost > max(FEW_REFERENCES, LOSS_SHARE * (held + lost))


@dataclass(slots=True)
class _Quarantine:
    lease: LeaseId = NO_LEASE
    granted_s: float = 0.0
    tombs: int = 0


class Collector:
    def __init__(
        self,
        store: Store,
        view: IdentityView,
        counts: Counts,
        clock: Clock,
        chooser: random.Random,
        *,
        grace_s: float,
        quarantine_s: float,
        session_ttl_s: float,
    ) -> None:
        self._store = store
        self._view = view
        self._counts = counts
        self._clock = clock
        self._grace_s = grace_s * (1 + chooser.random() * JITTER_SHARE)
        self._quarantine_s = quarantine_s
        self._session_ttl_s = session_ttl_s
        self._quarantine = _Quarantine()

    async def run(self) -> None:
        """Until cancelled. Raises `Retry` when the store is away."""
        await self._until_synced()
        now_s = self._clock.monotonic_s()
        losses = _Losses(now_s, self._view.released)
        resume_s = now_s + self._session_ttl_s
        while True:
            now_s = self._clock.monotonic_s()
            if losses.alarming(self._view.released, self._view.references, now_s):
                losses = _Losses(now_s, self._view.released)
                resume_s = now_s + self._session_ttl_s
                log.warning("identity.collecting_suspended", pause_s=self._session_ttl_s)
            if now_s < resume_s:
                await self._clock.sleep(min(resume_s - now_s, LONGEST_SLEEP_S))
                continue
            due = self._due(now_s)
            if due:
                await self._collect(due)
            else:
                await self._until_due(now_s)

    async def _until_synced(self) -> None:
        while True:
            try:
                return await self._view.ready()
            except Retry:
                continue

    def _due(self, now_s: float) -> list[NumericIdentity]:
        due: list[NumericIdentity] = []
        grace_s = self._grace_now_s()
        for number, since_s in self._view.idle_since().items():
            if since_s + grace_s > now_s or len(due) == BATCH:
                break
            due.append(number)
        return due

    def _grace_now_s(self) -> float:
        free = self._view.free
        if len(free) < (1 - PRESSURE) * free.total:
            return min(self._grace_s, PRESSED_GRACE_S)
        return self._grace_s

    async def _until_due(self, now_s: float) -> None:
        first = next(iter(self._view.idle_since().values()), None)
        if first is None:
            await self._view.idle_news()
            return
        wait_s = first + self._grace_now_s() - now_s
        await self._clock.sleep(min(max(wait_s, SHORTEST_SLEEP_S), LONGEST_SLEEP_S))

    async def _collect(self, due: list[NumericIdentity]) -> None:
        items: list[Collectable] = []
        for number in due:
            # First, so that a number that cannot be collected does not come up at once again.
            self._view.postpone(number)
            item = self._view.collectable(number)
            if item is not None:
                items.append(item)
        if not items:
            return
        lease = await self._quarantine_lease(len(items))
        try:
            result = await self._store.txn(
                Txn(success=tuple(collect(item, lease) for item in items))
            )
        except NotFound:
            self._quarantine = _Quarantine()
            raise Retry("the lease of the quarantine is gone; taking a new one") from None
        gone = [
            item.number
            for item, inner in zip(items, result.results, strict=True)
            if isinstance(inner, TxnResult) and inner.succeeded
        ]
        self._counts.collected += len(gone)
        if len(gone) == 1:
            log.info("identity.collected", identity=gone[0])
        elif gone:
            log.info("identity.collected", count=len(gone))

    async def _quarantine_lease(self, tombs: int) -> LeaseId:
        now_s, held = self._clock.monotonic_s(), self._quarantine
        stale = now_s - held.granted_s > TOMB_SPAN_S or held.tombs + tombs > TOMBS_PER_LEASE
        if held.lease == NO_LEASE or stale:
            lease = await self._store.grant(int(self._quarantine_s + TOMB_SPAN_S) + 1)
            held = self._quarantine = _Quarantine(lease, now_s)
        held.tombs += tombs
        return held.lease
