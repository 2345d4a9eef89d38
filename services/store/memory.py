"""The store in one process's memory, for tests and for trying things out.

Behaves as etcd does: transactions as in table.py, leases that take their keys with them, watches
that relist when their history is gone. The contract suite (tests/contract) holds it to that.
Leases expire by the given clock: at the next call, or, inside `async with`, at the deadline itself,
so that watchers see it.
"""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Self

from services.runtime.clock import Clock, SystemClock
from services.runtime.errors import Invalid, Retry
from services.runtime.tasks import Background
from services.store.mirror import Mirror, conflate
from services.store.model import (
    NO_LEASE,
    Changed,
    Delete,
    DeleteResult,
    KeyValue,
    LeaseId,
    Listing,
    Operation,
    Put,
    Removed,
    Revision,
    Synced,
    Txn,
    TxnResult,
    WatchEvent,
    prefix_end,
)
from services.store.table import Table
from services.store.txn import check, check_size

FIRST_LEASE = 0x7000_0000_0000_0001


@dataclass(slots=True)
class _Lease:
    ttl_s: int
    deadline_s: float


class MemoryStore:
    def __init__(self, clock: Clock | None = None) -> None:
        self._clock: Clock = clock or SystemClock()
        self._table = Table()
        self._compacted = 0
        self._history: list[Changed | Removed] = []
        self._leases: dict[LeaseId, _Lease] = {}
        self._next_lease = FIRST_LEASE
        self._soonest_s = math.inf  # no lease ends before this
        self._changed = asyncio.Event()
        self._breaks = 0
        self._reachable = True
        self._closed = False
        self._background = Background()
        self._term = 1

    # -- Store

    @property
    def term(self) -> int:
        return self._term

    async def get(self, key: str) -> KeyValue | None:
        await self._enter()
        return self._table.get(key)

    async def list(self, prefix: str) -> Listing:
        await self._enter()
        return Listing(self._table.revision, self._table.range(prefix, prefix_end(prefix)))

    async def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> Revision:
        return (await self.txn(Txn(success=(Put(key, value, lease),)))).revision

    async def delete(self, key: str) -> bool:
        result = (await self.txn(Txn(success=(Delete(key),)))).results[0]
        return isinstance(result, DeleteResult) and result.deleted > 0

    async def txn(self, txn: Txn) -> TxnResult:
        check(txn)
        check_size(_size(txn), "transaction")
        await self._enter()
        result, events = self._table.run(txn, self._leases.keys())
        self._publish(events)
        return result

    async def grant(self, ttl_s: int) -> LeaseId:
        await self._enter()
        lease = LeaseId(self._next_lease)
        self._next_lease += 1
        deadline_s = self._clock.monotonic_s() + ttl_s
        self._leases[lease] = _Lease(ttl_s, deadline_s)
        self._soonest_s = min(self._soonest_s, deadline_s)
        if self._background.is_open:
            self._background.start(self._expire_in_time(lease), name=f"lease {lease:x}")
        return lease

    async def keep_alive(self, lease: LeaseId) -> int:
        await self._enter()
        held = self._leases.get(lease)
        if held is None:
            return 0
        held.deadline_s = self._clock.monotonic_s() + held.ttl_s
        return held.ttl_s

    async def revoke(self, lease: LeaseId) -> None:
        await self._enter()
        self._drop(lease)

    async def watch(self, *prefixes: str) -> AsyncIterator[tuple[WatchEvent, ...]]:
        mirror = Mirror()
        await self._until_reachable()
        position, breaks = self._table.revision, self._breaks
        yield (*self._difference(mirror, prefixes), Synced(position))
        while await self._news(position, breaks):
            events: tuple[WatchEvent, ...]
            if position < self._compacted or breaks != self._breaks:
                events = self._difference(mirror, prefixes)
            else:
                events = self._since(position, prefixes)
                mirror.apply(events)
            position, breaks = self._table.revision, self._breaks
            if events:
                yield events

    async def close(self) -> None:
        self._closed = True
        self._signal()
        await self._background.close()

    async def __aenter__(self) -> Self:
        await self._background.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._closed = True
        self._signal()
        await self._background.close(exc[1] if isinstance(exc[1], BaseException) else None)

    # -- what tests do to it

    @property
    def revision(self) -> Revision:
        return self._table.revision

    def compact(self) -> None:
        """Forget the history: a watcher that has not read it yet relists."""
        self._compacted = self._table.revision
        self._history.clear()

    def break_watches(self) -> None:
        """Every watch loses its stream and finds its history compacted."""
        self._breaks += 1
        self._signal()

    def elect(self) -> None:
        """A new leader: every lease begins anew."""
        self._term += 1
        for held in self._leases.values():
            held.deadline_s = self._clock.monotonic_s() + held.ttl_s

    def set_reachable(self, reachable: bool) -> None:  # noqa: FBT001 - reads as a setter
        """Unreachable: calls raise `Retry`, watches wait."""
        self._reachable = reachable
        self._signal()

    # -- inside

    async def _enter(self) -> None:
        # Every call of a real store lets other tasks run; so does this one.
        await asyncio.sleep(0)
        if self._closed:
            raise Invalid("the store is closed")
        if not self._reachable:
            raise Retry("the memory store was made unreachable")
        now_s = self._clock.monotonic_s()
        if now_s >= self._soonest_s:
            for lease in [k for k, held in self._leases.items() if held.deadline_s <= now_s]:
                self._drop(lease)
            self._soonest_s = min(
                (held.deadline_s for held in self._leases.values()), default=math.inf
            )

    async def _until_reachable(self) -> None:
        while not self._reachable and not self._closed:
            await self._changed.wait()

    async def _news(self, position: int, breaks: int) -> bool:
        """Wait for something beyond `position`; False when the store was closed."""
        await asyncio.sleep(0)
        while not self._closed:
            if self._reachable and (self._table.revision > position or self._breaks > breaks):
                return True
            await self._changed.wait()
        return False

    def _signal(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _publish(self, events: Sequence[Changed | Removed]) -> None:
        if events:
            self._history += events
            self._signal()

    def _difference(self, mirror: Mirror, prefixes: tuple[str, ...]) -> tuple[WatchEvent, ...]:
        found = {kv.key: kv for p in prefixes for kv in self._table.range(p, prefix_end(p))}
        return mirror.difference(found.values(), self._table.revision)

    def _since(self, position: int, prefixes: tuple[str, ...]) -> tuple[WatchEvent, ...]:
        pending: dict[str, WatchEvent] = {}
        first = bisect_left(self._history, position + 1, key=_revision_of)
        conflate(pending, (e for e in self._history[first:] if _key_of(e).startswith(prefixes)))
        return tuple(pending.values())

    def _drop(self, lease: LeaseId) -> None:
        if self._leases.pop(lease, None) is not None:
            self._publish(self._table.drop(lease))

    async def _expire_in_time(self, lease: LeaseId) -> None:
        while lease in self._leases:
            left_s = self._leases[lease].deadline_s - self._clock.monotonic_s()
            if left_s <= 0:
                self._drop(lease)
                return
            await self._clock.sleep(left_s)


def _size(txn: Txn) -> int:
    return sum(_size_of(op) for op in (*txn.success, *txn.failure))


def _size_of(operation: Operation) -> int:
    match operation:
        case Txn():
            return _size(operation)
        case Put(key=key, value=value):
            return len(key.encode()) + len(value)
        case _:
            return len(operation.key.encode())


def _key_of(event: Changed | Removed) -> str:
    return event.kv.key if isinstance(event, Changed) else event.key


def _revision_of(event: Changed | Removed) -> Revision:
    return event.kv.mod_revision if isinstance(event, Changed) else event.revision
