"""Building transactions, and refusing those that etcd would refuse.

The limits are etcd's defaults, checked before sending so that the message can say what to do. etcd
counts operations along a path: the widths of a transaction and of those nested in it add up.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

from services.runtime.errors import Invalid
from services.store.model import (
    Compare,
    Delete,
    Operation,
    OperationResult,
    Put,
    Relation,
    Revision,
    Target,
    Txn,
    TxnResult,
    prefix_end,
)

MAX_TXN_OPS: Final = 128
MAX_REQUEST_BYTES: Final = 1_572_864


def absent(key: str) -> Compare:
    return Compare(key, Target.CREATE, Relation.EQUAL, 0)


def present(key: str) -> Compare:
    return Compare(key, Target.CREATE, Relation.GREATER, 0)


def value_is(key: str, value: bytes) -> Compare:
    """False when the key is absent."""
    return Compare(key, Target.VALUE, Relation.EQUAL, value)


def mod_is(key: str, revision: Revision) -> Compare:
    """Revision 0: the key is absent."""
    return Compare(key, Target.MOD, Relation.EQUAL, revision)


def prefix_empty(prefix: str) -> Compare:
    """No key starts with `prefix`."""
    return Compare(prefix, Target.CREATE, Relation.EQUAL, 0, range_end=prefix_end(prefix))


def delete_prefix(prefix: str) -> Delete:
    return Delete(prefix, range_end=prefix_end(prefix))


def bulk_txn(compares: Iterable[Compare], operations: Sequence[Operation]) -> Txn:
    """IF `compares` THEN all `operations`, nested as deep as the operation limit asks for: up to
    128 flat, 4,096 in two levels, some 74,000 in three. The request size limit stays."""
    guards = tuple(compares)
    return Txn(compares=guards, success=_nest(tuple(operations), MAX_TXN_OPS))


def results_of(result: TxnResult) -> Iterator[OperationResult]:
    """Of the operations given to `bulk_txn`, in their order."""
    for one in result.results:
        if isinstance(one, TxnResult):
            yield from results_of(one)
        else:
            yield one


def _nest(operations: tuple[Operation, ...], budget: int) -> tuple[Operation, ...]:
    if len(operations) <= budget:
        return operations
    depth = next(d for d in range(2, budget) if (budget // d) ** d >= len(operations))
    width = budget // depth
    size = -(-len(operations) // width)
    return tuple(
        Txn(success=_nest(operations[start : start + size], budget - width))
        for start in range(0, len(operations), size)
    )


@dataclass(slots=True)
class _Touched:
    """Keys that one branch writes."""

    puts: set[str] = field(default_factory=set)
    deletes: set[str] = field(default_factory=set)
    ranges: list[tuple[str, str]] = field(default_factory=list)

    def add(self, other: _Touched) -> None:
        for key in other.puts:
            self.put(key)
        self.merge(_Touched(deletes=other.deletes, ranges=other.ranges))

    def put(self, key: str) -> None:
        if key in self.puts:
            raise Invalid(f"transaction puts key {key!r} twice; etcd refuses that")
        self.puts.add(key)

    def merge(self, other: _Touched) -> None:
        self.puts |= other.puts
        self.deletes |= other.deletes
        self.ranges += other.ranges

    def refuse_overlap(self) -> None:
        clash = next(iter(self.puts & self.deletes), None)
        if clash is None and self.ranges:
            clash = next((k for k in self.puts for r in self.ranges if _within(k, *r)), None)
        if clash is not None:
            raise Invalid(f"transaction puts and deletes key {clash!r}; etcd refuses that")


def check(txn: Txn) -> None:
    """Raises `Invalid` for too many operations along a path, and for a key that one outcome of the
    transaction would write twice."""
    _touched(txn, MAX_TXN_OPS)


def check_size(size: int, what: str) -> None:
    if size > MAX_REQUEST_BYTES:
        raise Invalid(
            f"{what} of {size} bytes exceeds the {MAX_REQUEST_BYTES} that etcd takes at once;"
            " split it"
        )


def writes(txn: Txn) -> bool:
    """Whether any outcome of the transaction changes the store."""
    return any(
        isinstance(op, Put | Delete) or (isinstance(op, Txn) and writes(op))
        for op in (*txn.success, *txn.failure)
    )


def _touched(txn: Txn, budget: int) -> _Touched:
    width = max(len(txn.compares), len(txn.success), len(txn.failure))
    if width > budget:
        raise Invalid(
            f"transaction is {width} operations wide where {budget} of {MAX_TXN_OPS} are left;"
            " split it, or nest it with bulk_txn"
        )
    touched = _branch(txn.success, budget - width)
    if txn.failure:
        # The two branches exclude each other, so they may write the same keys.
        touched.merge(_branch(txn.failure, budget - width))
    return touched


def _branch(operations: tuple[Operation, ...], budget: int) -> _Touched:
    touched = _Touched()
    for operation in operations:
        match operation:
            case Put(key=key):
                touched.put(key)
            case Delete(key=key, range_end=None):
                touched.deletes.add(key)
            case Delete(key=key, range_end=str(end)):
                touched.ranges.append((key, end))
            case Txn():
                touched.add(_touched(operation, budget))
            case _:
                pass
    if touched.deletes or touched.ranges:
        touched.refuse_overlap()
    return touched


def _within(key: str, start: str, end: str) -> bool:
    return key >= start and (end == "\0" or key < end)
