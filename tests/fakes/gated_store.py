"""A store whose calls wait at a gate, so that a test chooses the order in which they happen."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Self

from services.store.model import (
    NO_LEASE,
    KeyValue,
    LeaseId,
    Listing,
    Revision,
    Store,
    Txn,
    TxnResult,
    WatchEvent,
)


class Gate:
    """Shared by the stores of several replicas. `admit(n)` lets the n-th waiting call through;
    while `open`, nothing waits."""

    def __init__(self) -> None:
        self.open = False
        self._waiting: list[asyncio.Event] = []

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    async def pass_through(self) -> None:
        if self.open:
            return
        turn = asyncio.Event()
        self._waiting.append(turn)
        await turn.wait()

    def admit(self, n: int) -> None:
        self._waiting.pop(n % len(self._waiting)).set()


class GatedStore:
    """`lose_answers`: the next so many transactions happen, but the caller sees `error`."""

    def __init__(self, store: Store, gate: Gate) -> None:
        self._store = store
        self._gate = gate
        self.lose_answers = 0
        self.error: Exception = RuntimeError("no error was given")

    @property
    def term(self) -> int:
        return self._store.term

    async def get(self, key: str) -> KeyValue | None:
        await self._gate.pass_through()
        return await self._store.get(key)

    async def list(self, prefix: str) -> Listing:
        await self._gate.pass_through()
        return await self._store.list(prefix)

    async def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> Revision:
        await self._gate.pass_through()
        return await self._store.put(key, value, lease)

    async def delete(self, key: str) -> bool:
        await self._gate.pass_through()
        return await self._store.delete(key)

    async def txn(self, txn: Txn) -> TxnResult:
        await self._gate.pass_through()
        result = await self._store.txn(txn)
        if self.lose_answers > 0:
            self.lose_answers -= 1
            raise self.error
        return result

    async def grant(self, ttl_s: int) -> LeaseId:
        await self._gate.pass_through()
        return await self._store.grant(ttl_s)

    async def keep_alive(self, lease: LeaseId) -> int:
        await self._gate.pass_through()
        return await self._store.keep_alive(lease)

    async def revoke(self, lease: LeaseId) -> None:
        await self._gate.pass_through()
        await self._store.revoke(lease)

    async def watch(self, *prefixes: str) -> AsyncIterator[tuple[WatchEvent, ...]]:
        async for batch in self._store.watch(*prefixes):
            await self._gate.pass_through()
            yield batch

    async def close(self) -> None:
        await self._store.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc: object) -> None:
        pass
