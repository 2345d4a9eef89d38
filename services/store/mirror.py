"""What a watcher has told its consumer, and the events that bring the consumer up to date.

After a gap whose history is gone the store is listed anew; the difference to what the consumer
knows becomes events, removals included. Also the queue between the two, which keeps only the last
event per key.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from services.runtime.errors import TesseraError
from services.store.model import Changed, KeyValue, Removed, Revision, Synced, WatchEvent


class Mirror:
    """Modification revision of every key the consumer knows."""

    def __init__(self) -> None:
        self._known: dict[str, Revision] = {}

    def apply(self, events: Iterable[WatchEvent]) -> None:
        known = self._known
        for event in events:
            if isinstance(event, Changed):
                known[event.kv.key] = event.kv.mod_revision
            elif isinstance(event, Removed):
                known.pop(event.key, None)

    def difference(
        self, items: Iterable[KeyValue], revision: Revision, *, same_store: bool = True
    ) -> tuple[Changed | Removed, ...]:
        """Events from what is known to `items`, all of the watched keys at `revision`; removals
        first. `same_store` false: revisions are another store's and say nothing."""
        found = {item.key: item for item in items}
        gone = tuple(Removed(key, revision) for key in self._known if key not in found)
        changed = tuple(
            Changed(item)
            for item in found.values()
            if not same_store or self._known.get(item.key) != item.mod_revision
        )
        events = gone + changed
        self.apply(events)
        return events


def conflate(pending: dict[str, WatchEvent], events: Iterable[Changed | Removed]) -> None:
    """Add to `pending` keeping the last event per key and the order of revisions."""
    for event in events:
        key = event.kv.key if isinstance(event, Changed) else event.key
        pending.pop(key, None)
        pending[key] = event


class EventQueue:
    """Between one task that reads a store and one consumer. Conflates per key; above `limit`
    keys the reader waits, and the back-pressure reaches the store."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending: dict[str, WatchEvent] = {}
        self._synced: Synced | None = None
        self._failure: TesseraError | None = None
        self._closed = False
        self._filled = asyncio.Event()
        self._taken = asyncio.Event()
        self._taken.set()

    async def put(self, events: Iterable[Changed | Removed]) -> None:
        conflate(self._pending, events)
        if self._pending:
            self._filled.set()
        if len(self._pending) >= self._limit:
            await self.taken()

    async def synced(self, revision: Revision) -> None:
        """Returns when the consumer has taken it, so that no later event overtakes the listing."""
        self._synced = Synced(revision)
        self._filled.set()
        await self.taken()

    async def taken(self) -> None:
        self._taken.clear()
        await self._taken.wait()

    def fail(self, error: TesseraError) -> None:
        """`take` raises it once what came before was taken."""
        self._failure = error
        self._filled.set()

    def close(self) -> None:
        self._closed = True
        self._filled.set()

    async def take(self) -> tuple[WatchEvent, ...]:
        """All that is pending, oldest first; empty when the queue was closed."""
        await self._filled.wait()
        events = tuple(self._pending.values())
        if self._synced is not None:
            events += (self._synced,)
            self._synced = None
        if not events and self._failure is not None:
            raise self._failure
        self._pending.clear()
        self._taken.set()
        if self._failure is None and not self._closed:
            self._filled.clear()
        return events
