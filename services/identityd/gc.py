"""Collecting identities that nothing uses.

    watch: last reference gone ──► idle since t ──► t + grace ──► collect transaction
                                                                   │ still unused? unchanged?
                                        quarantine, leased ◄───────┘

No leader and no locks: every replica collects, the transactions decide, and losing is harmless. The
grace begins when this process *saw* the last reference go, so a replica that just started waits
longest. What looks like a failure rather than workloads ending suspends collecting (caution.py).
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Final

from identity import keys
from identity.numbers import NumericIdentity
from services.identityd.caution import Caution, Signs
from services.identityd.stats import Counts
from services.identityd.txns import Collectable, guarded
from services.identityd.view import IdentityView
from services.runtime.clock import Clock
from services.runtime.errors import NotFound, Retry
from services.runtime.log import logger
from services.store.model import NO_LEASE, LeaseId, Store, TxnResult

log = logger(__name__)

# Transactions nested in one; 64 and the widest of them, 3, stay below the store's limit of 128.
BATCH: Final = 64
# Tombstones of this span share a lease, which outlives the quarantine by as much; a lease with
# many keys is slow to revoke.
TOMB_SPAN_S: Final = 30.0
TOMBS_PER_LEASE: Final = 1000
# Share of the numbers taken -> grace. Waiting for the whole grace would risk exhaustion.
PRESSED_GRACE_S: Final = ((0.95, 5.0), (0.8, 30.0))
# Idle numbers are looked at this often at least, since pressure may shorten their grace.
LONGEST_SLEEP_S: Final = 15.0
# Numbers that become idle one after another are collected together.
SHORTEST_SLEEP_S: Final = 0.1
# Replicas see the same event at the same time; this spreads their attempts.
JITTER_SHARE: Final = 0.05


@dataclass(slots=True)
class _Quarantine:
    """`guard` lives on a lease of half the span, so it is gone long before `lease` is short."""

    lease: LeaseId = NO_LEASE
    guard: str = ""
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
        await self._view.until_synced()
        now_s = self._clock.monotonic_s()
        caution = Caution(self._session_ttl_s, self._signs(now_s), now_s)
        while True:
            now_s = self._clock.monotonic_s()
            rested = caution.left_s(now_s) <= 0
            reason = caution.alarm(self._signs(now_s), now_s)
            if reason is not None:
                # They are answered for; the next alarm is about others.
                self._view.losses.clear()
            if reason is not None and rested:
                log.warning(
                    "identity.collecting_suspended", pause_s=self._session_ttl_s, reason=reason
                )
            rest_s = caution.left_s(now_s)
            if rest_s > 0:
                await self._clock.sleep(min(rest_s, LONGEST_SLEEP_S))
                continue
            due = self._due(now_s)
            if due:
                await self._collect(due)
            else:
                await self._until_due(now_s)

    def _signs(self, now_s: float) -> Signs:
        view = self._view
        return Signs(view.losses.lately(now_s), view.references, self._store.term, view.heard_s)

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
        taken = 1 - len(free) / free.total
        for share, grace_s in PRESSED_GRACE_S:
            if taken > share:
                return min(self._grace_s, grace_s)
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
        quarantine = await self._current_quarantine(len(items))
        try:
            result = await self._store.txn(guarded(quarantine.guard, items, quarantine.lease))
        except NotFound:
            self._quarantine = _Quarantine()
            raise Retry("the lease of the quarantine is gone; taking a new one") from None
        if not result.succeeded:
            self._quarantine = _Quarantine()
            return
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

    async def _current_quarantine(self, tombs: int) -> _Quarantine:
        now_s, held = self._clock.monotonic_s(), self._quarantine
        stale = now_s - held.granted_s > TOMB_SPAN_S / 2 or held.tombs + tombs > TOMBS_PER_LEASE
        if held.lease == NO_LEASE or stale:
            lease = await self._store.grant(int(self._quarantine_s + TOMB_SPAN_S) + 1)
            guard = keys.guard_key(lease)
            await self._store.put(guard, b"", await self._store.grant(int(TOMB_SPAN_S / 2) + 1))
            held = self._quarantine = _Quarantine(lease, guard, now_s)
        held.tombs += tombs
        return held
