"""Addresses and the identities behind them, published for this cluster's peers.

The value is the JSON that ClusterMesh readers decode (Go field names; a reader rejects an entry
whose address, in Go's canonical text, is not the end of its key). Entries hang on the node's lease.

Nodes announce a few addresses at a time, and many nodes do: what waits is committed together, so
the store sees some transactions of many keys instead of one for each endpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Final

import msgspec

from identity import keys
from identity.numbers import FIRST_ALLOCATED, NumericIdentity
from services.identityd.allocator import lost_session
from services.identityd.published import AddressValue
from services.identityd.stats import Counts
from services.runtime.errors import Conflict, Invalid, NotFound, TesseraError
from services.store.commit import Committer
from services.store.model import (
    NO_LEASE,
    Delete,
    KeyValue,
    LeaseId,
    Operation,
    Put,
    Range,
    RangeResult,
    Store,
    Txn,
    TxnResult,
)
from services.store.txn import bulk_txn, mod_is

# Keys read at once, below the store's limit of 128 operations.
BATCH: Final = 100
# Announcements committed along with others; more of one node are a transaction of their own.
FEW: Final = 60
# Announcements of one transaction, nested; some 300 kB, a fifth of what the store takes at once.
BULK: Final = 1000
WITHDRAW_ROUNDS: Final = 3


class Announcer:
    def __init__(
        self, store: Store, committer: Committer, counts: Counts, allocatable: range
    ) -> None:
        self._store = store
        self._committer = committer
        self._counts = counts
        self._allocatable = allocatable

    async def announce(self, node: str, lease: LeaseId, values: Iterable[AddressValue]) -> None:
        """All or, when a later batch fails, the first batches; repeating is harmless.

        Raises `Invalid` before anything is written, `NotFound` when the lease is gone.
        """
        encoder = msgspec.json.Encoder()
        puts: dict[str, Operation] = {}
        for value in values:
            self._check(value)
            key = keys.ip_key(value.ip)
            puts[key] = Put(key, encoder.encode(value), lease)
        operations = tuple(puts.values())
        try:
            if len(operations) <= FEW:
                await self._committer.one(Txn(success=operations), lease)
            else:
                for start in range(0, len(operations), BULK):
                    await self._store.txn(bulk_txn((), operations[start : start + BULK]))
        except NotFound:
            raise lost_session(node, lease) from None
        self._counts.announced += len(operations)

    async def withdraw(self, host_ip: str, ips: Iterable[str]) -> None:
        """Removes the entries that still name `host_ip`; the others are somebody else's by now."""
        canonical(host_ip, "host_ip")
        wanted = sorted({canonical(ip, "address") for ip in ips})
        for start in range(0, len(wanted), BATCH):
            await self._withdraw_batch(host_ip, wanted[start : start + BATCH])

    async def _withdraw_batch(self, host_ip: str, ips: Sequence[str]) -> None:
        left = [keys.ip_key(ip) for ip in ips]
        for _ in range(WITHDRAW_ROUNDS):
            found = await self._read(left)
            ours = [kv for kv in found if _names_host(kv, host_ip)]
            if not ours:
                return
            deletes = [
                Txn(compares=(mod_is(kv.key, kv.mod_revision),), success=(Delete(kv.key),))
                for kv in ours
            ]
            outcomes = await self._committer.submit(deletes, NO_LEASE)
            for outcome in outcomes:
                if isinstance(outcome, TesseraError):
                    raise outcome
            left = [
                kv.key
                for kv, outcome in zip(ours, outcomes, strict=True)
                if isinstance(outcome, TxnResult) and not outcome.succeeded
            ]
            if not left:
                return
        raise Conflict(f"{len(left)} addresses of {host_ip} are announced anew while withdrawn")

    async def _read(self, wanted: Sequence[str]) -> list[KeyValue]:
        result = await self._store.txn(Txn(success=tuple(Range(key) for key in wanted)))
        return [kv for r in result.results if isinstance(r, RangeResult) for kv in r.items]

    def _check(self, value: AddressValue) -> None:
        canonical(value.ip, "address")
        canonical(value.host_ip, f"host_ip of {value.ip}")
        if not (0 < value.number < FIRST_ALLOCATED or value.number in self._allocatable):
            raise Invalid(
                f"address {value.ip}: identity {NumericIdentity(value.number)} is not one of this"
                " cluster; announce the number that Allocate returned"
            )


def canonical(ip: str, what: str) -> str:
    """`ip` itself; raises `Invalid` unless it is an address in canonical text."""
    try:
        text = str(ip_address(ip))
    except ValueError:
        raise Invalid(f"{what} {ip!r} is no IP address") from None
    if text != ip:
        raise Invalid(f"{what} {ip!r} is not in canonical form; write {text!r}")
    return text


def _names_host(kv: KeyValue, host_ip: str) -> bool:
    try:
        return msgspec.json.decode(kv.value, type=AddressValue).host_ip == host_ip
    except msgspec.DecodeError:
        # Not written by us, so not ours to withdraw.
        return False
