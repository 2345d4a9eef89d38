"""The store in etcd.

    EtcdStore ── get list put delete txn grant revoke ──► connection.py ──► one of the endpoints
        ├── keep_alive ──► lease.py   one stream for all leases
        └── watch ──► watch.py        one stream per watch, healed inside

Used inside `async with`: the streams are its tasks.
"""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Self

from tessera_wire.etcd import etcd_pb2 as pb

from services.runtime.clock import Clock, SystemClock
from services.runtime.config import EtcdConfig
from services.runtime.errors import Invalid, NotFound
from services.runtime.tasks import Background
from services.store.codec import key_bytes, key_value, txn_request, txn_result
from services.store.connection import Connection
from services.store.lease import KeepAlives
from services.store.listing import PAGE_KEYS, whole
from services.store.model import (
    NO_LEASE,
    KeyValue,
    LeaseId,
    Listing,
    Revision,
    Txn,
    TxnResult,
    WatchEvent,
)
from services.store.txn import check, check_size, writes
from services.store.watch import Watcher


class EtcdStore:
    def __init__(
        self,
        config: EtcdConfig,
        clock: Clock | None = None,
        chance: random.Random | None = None,
        *,
        page_keys: int = PAGE_KEYS,
    ) -> None:
        self._connection = Connection(config, clock or SystemClock(), chance or random.Random())
        self._background = Background()
        self._keep_alives = KeepAlives(self._connection, self._background)
        self._watchers: set[Watcher] = set()
        self._page_keys = page_keys

    @property
    def term(self) -> int:
        return self._connection.term

    async def get(self, key: str) -> KeyValue | None:
        response = await self._connection.call(
            lambda member: member.kv.Range, pb.RangeRequest(key=key_bytes(key)), repeatable=True
        )
        return key_value(response.kvs[0]) if response.kvs else None

    async def list(self, prefix: str) -> Listing:
        return await whole(self._connection, prefix, self._page_keys)

    async def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> Revision:
        """Not repeated when its outcome is unknown: a later writer's value could be lost."""
        request = pb.PutRequest(key=key_bytes(key), value=value, lease=lease)
        check_size(len(key) + len(value), f"key {key!r}")
        response = await self._connection.call(
            lambda member: member.kv.Put, request, repeatable=False
        )
        return Revision(response.header.revision)

    async def delete(self, key: str) -> bool:
        response = await self._connection.call(
            lambda member: member.kv.DeleteRange,
            pb.DeleteRangeRequest(key=key_bytes(key)),
            repeatable=False,
        )
        return response.deleted > 0

    async def txn(self, txn: Txn) -> TxnResult:
        check(txn)
        request = txn_request(txn)
        check_size(request.ByteSize(), "transaction")
        response = await self._connection.call(
            lambda member: member.kv.Txn, request, repeatable=not writes(txn)
        )
        return txn_result(response, Revision(response.header.revision))

    async def grant(self, ttl_s: int) -> LeaseId:
        """Repeated when its outcome is unknown: a lease nobody knows ends by itself."""
        response = await self._connection.call(
            lambda member: member.lease.LeaseGrant,
            pb.LeaseGrantRequest(TTL=ttl_s),
            repeatable=True,
        )
        return LeaseId(response.ID)

    async def keep_alive(self, lease: LeaseId) -> int:
        return await self._keep_alives.renew(lease)

    async def revoke(self, lease: LeaseId) -> None:
        """A lease that is gone already is no error."""
        try:
            await self._connection.call(
                lambda member: member.lease.LeaseRevoke,
                pb.LeaseRevokeRequest(ID=lease),
                repeatable=True,
            )
        except NotFound:
            return

    async def watch(self, *prefixes: str) -> AsyncIterator[tuple[WatchEvent, ...]]:
        if not prefixes:
            raise Invalid("a watch needs at least one prefix")
        watcher = Watcher(self._connection, prefixes, self._page_keys)
        task = self._background.start(watcher.run(), name=f"watch {' '.join(prefixes)}")
        self._watchers.add(watcher)
        try:
            while events := await watcher.queue.take():
                yield events
        finally:
            self._watchers.discard(watcher)
            task.cancel()

    async def close(self) -> None:
        await self._close(None)

    async def __aenter__(self) -> Self:
        await self._background.open()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self._close(exc[1] if isinstance(exc[1], BaseException) else None)

    async def _close(self, error: BaseException | None) -> None:
        for watcher in self._watchers:
            watcher.queue.close()
        try:
            await self._background.close(error)
        finally:
            await self._connection.close()
