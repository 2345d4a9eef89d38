"""Keys and transactions of the memory store: etcd's rules, without time, leases' ends or watchers.

All compares of a transaction, nested ones included, are judged before its first operation; what it
writes has one revision; a transaction that writes nothing makes none.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from services.runtime.errors import Invalid, NotFound
from services.store.model import (
    NO_LEASE,
    Changed,
    Compare,
    Delete,
    DeleteResult,
    KeyValue,
    LeaseId,
    Operation,
    OperationResult,
    Put,
    PutResult,
    Range,
    RangeResult,
    Relation,
    Removed,
    Revision,
    Target,
    Txn,
    TxnResult,
)

Event = Changed | Removed


@dataclass(frozen=True, slots=True)
class _Path:
    """Which branch a transaction takes, and those directly within that branch."""

    succeeded: bool
    nested: tuple[_Path, ...]


class Table:
    def __init__(self) -> None:
        self.revision = Revision(1)
        self._data: dict[str, KeyValue] = {}
        self._keys: list[str] = []
        self._of_lease: dict[LeaseId, set[str]] = {}

    def get(self, key: str) -> KeyValue | None:
        return self._data.get(key)

    def range(self, key: str, range_end: str | None) -> tuple[KeyValue, ...]:
        if range_end is None:
            return (self._data[key],) if key in self._data else ()
        start = bisect_left(self._keys, key)
        stop = len(self._keys) if range_end == "\0" else bisect_left(self._keys, range_end)
        return tuple(self._data[k] for k in self._keys[start:stop])

    def run(self, txn: Txn, leases: Collection[LeaseId]) -> tuple[TxnResult, list[Event]]:
        """Raises `NotFound`, having written nothing, when a put that would happen names a lease
        that is not in `leases`."""
        path = self._path(txn)
        for put in _puts(txn, path):
            if put.lease != NO_LEASE and put.lease not in leases:
                raise NotFound(f"lease {put.lease:x} of key {put.key!r} is gone")
        events: list[Event] = []
        result = self._run(txn, path, events)
        if events:
            self.revision = self._next
        return _at(result, self.revision), events

    def drop(self, lease: LeaseId) -> list[Event]:
        """Remove the keys of a lease."""
        gone = sorted(self._of_lease.get(lease, ()))
        for key in gone:
            self._erase(key)
        if gone:
            self.revision = self._next
        return [Removed(key, self.revision) for key in gone]

    @property
    def _next(self) -> Revision:
        return Revision(self.revision + 1)

    def _path(self, txn: Txn) -> _Path:
        succeeded = all(self._holds(compare) for compare in txn.compares)
        branch = txn.success if succeeded else txn.failure
        return _Path(succeeded, tuple(self._path(op) for op in branch if isinstance(op, Txn)))

    def _holds(self, compare: Compare) -> bool:
        found = self.range(compare.key, compare.range_end)
        if not found:
            return compare.target is not Target.VALUE and _relates(compare, 0)
        return all(_relates(compare, _field(compare.target, kv)) for kv in found)

    def _run(self, txn: Txn, path: _Path, events: list[Event]) -> TxnResult:
        nested = iter(path.nested)
        results: list[OperationResult] = []
        for operation in _branch(txn, path):
            if isinstance(operation, Txn):
                results.append(self._run(operation, next(nested), events))
            else:
                results.append(self._apply(operation, events))
        return TxnResult(self.revision, path.succeeded, tuple(results))

    def _apply(self, operation: Put | Delete | Range, events: list[Event]) -> OperationResult:
        match operation:
            case Put():
                events.append(Changed(self._write(operation)))
                return PutResult()
            case Delete(key=key, range_end=range_end):
                found = self.range(key, range_end)
                for kv in found:
                    self._erase(kv.key)
                    events.append(Removed(kv.key, self._next))
                return DeleteResult(len(found))
            case Range(key=key, range_end=range_end):
                return _answer(operation, self.range(key, range_end))

    def _write(self, put: Put) -> KeyValue:
        old = self._data.get(put.key)
        if old is None:
            insort(self._keys, put.key)
        else:
            self._detach(old)
        if put.lease != NO_LEASE:
            self._of_lease.setdefault(put.lease, set()).add(put.key)
        created = self._next if old is None else old.create_revision
        version = 1 if old is None else old.version + 1
        kv = KeyValue(put.key, put.value, created, self._next, version, put.lease)
        self._data[put.key] = kv
        return kv

    def _erase(self, key: str) -> None:
        self._detach(self._data.pop(key))
        del self._keys[bisect_left(self._keys, key)]

    def _detach(self, kv: KeyValue) -> None:
        if kv.lease != NO_LEASE:
            held = self._of_lease[kv.lease]
            held.discard(kv.key)
            if not held:
                del self._of_lease[kv.lease]


def _branch(txn: Txn, path: _Path) -> tuple[Operation, ...]:
    return txn.success if path.succeeded else txn.failure


def _puts(txn: Txn, path: _Path) -> Iterator[Put]:
    nested = iter(path.nested)
    for operation in _branch(txn, path):
        if isinstance(operation, Put):
            yield operation
        elif isinstance(operation, Txn):
            yield from _puts(operation, next(nested))


def _answer(request: Range, found: tuple[KeyValue, ...]) -> RangeResult:
    if request.count_only:
        return RangeResult((), len(found))
    items = found[: request.limit] if request.limit else found
    if request.keys_only:
        items = tuple(
            KeyValue(kv.key, b"", kv.create_revision, kv.mod_revision, kv.version, kv.lease)
            for kv in items
        )
    return RangeResult(items, len(found))


def _field(target: Target, kv: KeyValue) -> int | bytes:
    match target:
        case Target.CREATE:
            return kv.create_revision
        case Target.MOD:
            return kv.mod_revision
        case Target.VERSION:
            return kv.version
        case Target.VALUE:
            return kv.value


def _relates(compare: Compare, left: int | bytes) -> bool:
    right = compare.operand
    if type(left) is not type(right):
        raise Invalid(f"{compare.target.value} of {compare.key!r} compared with {right!r}")
    sign = (left > right) - (left < right)  # type: ignore[operator]  # one type, by the line above
    match compare.relation:
        case Relation.EQUAL:
            return sign == 0
        case Relation.NOT_EQUAL:
            return sign != 0
        case Relation.GREATER:
            return sign > 0
        case Relation.LESS:
            return sign < 0


def _at(result: TxnResult, revision: Revision) -> TxnResult:
    results = tuple(_at(r, revision) if isinstance(r, TxnResult) else r for r in result.results)
    return TxnResult(revision, result.succeeded, results)
