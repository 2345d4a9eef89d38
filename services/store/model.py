"""Values of the store: keys, revisions, transactions, watch events, and the Store protocol.

Two implementations stand behind the protocol, `etcd.EtcdStore` and `memory.MemoryStore`; the
contract suite in tests/contract holds both to the same behaviour. Keys are text, values bytes.
Constructors for common compares, and for transactions of many operations, are in txn.py.
"""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from enum import Enum
from typing import NewType, Protocol, Self

Revision = NewType("Revision", int)
LeaseId = NewType("LeaseId", int)

NO_LEASE = LeaseId(0)

_SURROGATES = range(0xD800, 0xE000)


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: Revision
    mod_revision: Revision
    version: int
    lease: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True)
class Listing:
    """All of a range at one revision, ascending by key."""

    revision: Revision
    items: tuple[KeyValue, ...]


class Target(Enum):
    CREATE = "create"
    MOD = "mod"
    VALUE = "value"
    VERSION = "version"


class Relation(Enum):
    EQUAL = "="
    NOT_EQUAL = "!="
    GREATER = ">"
    LESS = "<"


@dataclass(frozen=True, slots=True)
class Compare:
    """`range_end` set: the comparison must hold for every key in [key, range_end). An absent key
    compares as revision and version 0, and as unequal to any value."""

    key: str
    target: Target
    relation: Relation
    operand: int | bytes
    range_end: str | None = None


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True)
class Delete:
    key: str
    range_end: str | None = None


@dataclass(frozen=True, slots=True)
class Range:
    key: str
    range_end: str | None = None
    limit: int = 0
    count_only: bool = False
    keys_only: bool = False


@dataclass(frozen=True, slots=True)
class Txn:
    """IF all compares hold THEN `success` ELSE `failure`. An operation may be a Txn itself."""

    compares: tuple[Compare, ...] = ()
    success: tuple[Operation, ...] = ()
    failure: tuple[Operation, ...] = ()


Operation = Put | Delete | Range | Txn


@dataclass(frozen=True, slots=True)
class RangeResult:
    items: tuple[KeyValue, ...]
    count: int


@dataclass(frozen=True, slots=True)
class DeleteResult:
    deleted: int


@dataclass(frozen=True, slots=True)
class PutResult:
    pass


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`results` are those of the branch taken, in order."""

    revision: Revision
    succeeded: bool
    results: tuple[OperationResult, ...] = field(default=())


OperationResult = RangeResult | DeleteResult | PutResult | TxnResult


# ------------------------------------------------------------------ watching


@dataclass(frozen=True, slots=True)
class Changed:
    kv: KeyValue


@dataclass(frozen=True, slots=True)
class Removed:
    key: str
    revision: Revision


@dataclass(frozen=True, slots=True)
class Synced:
    """The initial listing of all prefixes is complete at `revision`. Sent once."""

    revision: Revision


WatchEvent = Changed | Removed | Synced


class Store(Protocol):
    """Raises `Retry` when the store cannot be reached or answers too late, `Invalid` for a request
    it refuses by its limits, `Exhausted` when its space is used up, `NotFound` for a lost lease."""

    @property
    def term(self) -> int:
        """Grows when the store has elected a leader anew, as far as its answers have told; 0 until
        the first one. Every lease begins anew with a new leader."""
        ...

    async def get(self, key: str) -> KeyValue | None: ...
    async def list(self, prefix: str) -> Listing: ...
    async def put(self, key: str, value: bytes, lease: LeaseId = NO_LEASE) -> Revision: ...
    async def delete(self, key: str) -> bool: ...
    async def txn(self, txn: Txn) -> TxnResult: ...
    async def grant(self, ttl_s: int) -> LeaseId: ...
    async def keep_alive(self, lease: LeaseId) -> int:
        """Remaining TTL in seconds; 0 when the lease is gone."""
        ...

    async def revoke(self, lease: LeaseId) -> None: ...

    def watch(self, *prefixes: str) -> AsyncIterator[tuple[WatchEvent, ...]]:
        """List every prefix at one revision, then follow. Batches arrive in revision order across
        the prefixes; a compaction or broken stream is healed inside (relist and diff), not guessed.
        The first batches are the listing, closed by one `Synced`.

        What happens to a key while the consumer is busy is conflated to the last event, so a batch
        names a key at most once and never ends inside a transaction. A key that was removed and
        made again between two batches shows as `Changed` with a later `create_revision`. Waits
        out an unreachable store; ends when the store is closed."""
        ...

    async def close(self) -> None: ...
    async def __aenter__(self) -> Self: ...
    async def __aexit__(self, *exc: object) -> None: ...


def prefix_end(prefix: str) -> str:
    """The first key after every key that starts with `prefix`. For the empty prefix NUL, which etcd
    reads as "to the end". Code points order as their UTF-8 bytes do, so the last one is raised."""
    head = prefix.rstrip(chr(sys.maxunicode))
    if not head:
        return "\0"
    following = ord(head[-1]) + 1
    if following == _SURROGATES.start:
        following = _SURROGATES.stop
    return head[:-1] + chr(following)
