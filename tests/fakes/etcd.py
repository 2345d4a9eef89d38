"""What tests against a store share: whether there is an etcd, and a consumer of watches."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Iterable

from services.runtime.config import EtcdConfig
from services.store.model import Changed, Removed, Synced, WatchEvent

NO_ETCD = "no etcd binary on PATH (Debian: etcd-server)"
HAVE_ETCD = shutil.which("etcd") is not None

DEADLINE_S = 20.0


def config(*endpoints: str, request_timeout_s: float = 5.0) -> EtcdConfig:
    return EtcdConfig(endpoints=endpoints, request_timeout_s=request_timeout_s)


class Follower:
    """Consumes a watch and keeps what a consumer would know."""

    def __init__(self, batches: AsyncIterator[tuple[WatchEvent, ...]]) -> None:
        self._batches = batches
        self.values: dict[str, bytes] = {}
        self.events: list[WatchEvent] = []
        self.batches: list[tuple[WatchEvent, ...]] = []

    async def step(self) -> tuple[WatchEvent, ...]:
        async with asyncio.timeout(DEADLINE_S):
            batch = await anext(self._batches)
        self.batches.append(batch)
        self.events += batch
        for event in batch:
            if isinstance(event, Changed):
                self.values[event.kv.key] = event.kv.value
            elif isinstance(event, Removed):
                self.values.pop(event.key, None)
        return batch

    async def until(self, reached: Callable[[Follower], bool]) -> None:
        while not reached(self):
            await self.step()

    async def until_synced(self) -> None:
        await self.until(lambda seen: any(isinstance(e, Synced) for e in seen.events))

    async def until_values(self, values: dict[str, bytes]) -> None:
        await self.until(lambda seen: seen.values == values)

    def revisions(self) -> list[int]:
        """Of what came after the listing, in order of arrival."""
        synced = next(i for i, e in enumerate(self.events) if isinstance(e, Synced))
        return [revision_of(event) for event in self.events[synced + 1 :]]


def revision_of(event: WatchEvent) -> int:
    return event.kv.mod_revision if isinstance(event, Changed) else event.revision


def keys_of(events: Iterable[WatchEvent]) -> list[str]:
    return [
        e.kv.key if isinstance(e, Changed) else e.key for e in events if not isinstance(e, Synced)
    ]
