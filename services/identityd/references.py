"""Giving references back when a node stops using identities."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from identity import keys
from identity.numbers import NumericIdentity
from services.store.model import Delete, Store, Txn

# One transaction, below the store's limit of 128.
BATCH: Final = 100


async def release(store: Store, node: str, numbers: Iterable[NumericIdentity]) -> None:
    """Idempotent. The identities stay until they were unused for the grace period."""
    wanted = sorted(set(numbers))
    for start in range(0, len(wanted), BATCH):
        batch = wanted[start : start + BATCH]
        await store.txn(Txn(success=tuple(Delete(keys.ref_key(n, node)) for n in batch)))
