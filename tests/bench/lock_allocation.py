"""The other way of allocating, to be measured beside: under a lock for each label set.

As Cilium's kvstore mode does it, without its limit of 20 operations a second: take the lock, look
for the set's value, pick a number and look again, create it under the lock, put the node's key, let
the lock go. Six round trips one after the other for a set that is new.
"""

from __future__ import annotations

import random

from services.store.model import Delete, LeaseId, Put, Range, RangeResult, Store, Txn, prefix_end
from services.store.txn import absent, present

ROOT = "bench/locked"


class LockedAllocation:
    def __init__(self, store: Store, lease: LeaseId, chooser: random.Random) -> None:
        self._store = store
        self._lease = lease
        self._chooser = chooser
        self.round_trips = 0

    async def allocate(self, labels: str) -> int:
        lock = f"{ROOT}/locks/{labels}/{self._chooser.getrandbits(64):x}"
        await self._acquire(lock, f"{ROOT}/locks/{labels}/")
        try:
            found = await self._value(labels)
            number = 0
            while not found and not number:
                found = await self._value(labels)
                number = await self._create(labels, lock)
            await self._store.put(f"{ROOT}/value/{labels}/node", b"%d" % number, self._lease)
            return number
        finally:
            self.round_trips += 2
            await self._store.delete(lock)

    async def _acquire(self, lock: str, prefix: str) -> None:
        """The oldest key under the prefix holds the lock; one that waits looks again."""
        result = await self._store.txn(
            Txn(success=(Put(lock, b"", self._lease), Range(prefix, prefix_end(prefix))))
        )
        self.round_trips += 1
        waiting = result.results[1]
        assert isinstance(waiting, RangeResult)
        items = waiting.items
        while min(items, key=lambda kv: kv.create_revision).key != lock:
            items = (await self._store.list(prefix)).items
            self.round_trips += 1

    async def _value(self, labels: str) -> bool:
        self.round_trips += 1
        return bool((await self._store.list(f"{ROOT}/value/{labels}/")).items)

    async def _create(self, labels: str, lock: str) -> int:
        """0 when the number was somebody else's."""
        self.round_trips += 1
        number = self._chooser.randrange(1 << 20, 1 << 24)
        key = f"{ROOT}/id/{number}"
        txn = Txn(compares=(absent(key), present(lock)), success=(Put(key, labels.encode()),))
        return number if (await self._store.txn(txn)).succeeded else 0


def clean() -> Delete:
    return Delete(f"{ROOT}/", prefix_end(f"{ROOT}/"))
