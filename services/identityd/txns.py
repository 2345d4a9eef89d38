"""The identity transactions. Each is right by its own compares, whoever else writes.

    create   IF idx, id/N, tomb/N absent           THEN put idx, id/N, ref     ELSE read idx
    unbury   IF idx, id/N absent, tomb/N unchanged THEN the same, delete tomb  ELSE read idx
    refer    IF idx = N                            THEN put ref                ELSE read idx
    collect  IF no ref to N, idx and id/N unchanged THEN delete both, put tomb

Collections stand behind a guard: a key whose lease ends long before the lease of the tombstones.
Whoever was stopped in between (SIGSTOP, a paused virtual machine) would otherwise lay tombstones
that are about to end.

A reference and a collection of one number never succeed both: whichever commits second finds the
other's work. The compares of one outer transaction are all judged before its first write, so the
two kinds must not share one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from identity import keys
from identity.allocate import Create, Refer
from identity.numbers import NumericIdentity
from services.store.model import Delete, KeyValue, LeaseId, Put, Range, RangeResult, Revision, Txn
from services.store.model import TxnResult as TxnResult
from services.store.txn import absent, mod_is, prefix_empty, present, value_is


@dataclass(frozen=True, slots=True)
class Collectable:
    """A number without references, and the revisions it was seen at."""

    number: NumericIdentity
    digest: str
    idx_revision: Revision
    id_revision: Revision


def of_decision(decision: Create | Refer, node: str, lease: LeaseId) -> Txn:
    match decision:
        case Create():
            return create(decision, node, lease)
        case Refer():
            return refer(decision, node, lease)


def create(decision: Create, node: str, lease: LeaseId) -> Txn:
    number, wanted = decision.number, decision.wanted
    idx, tomb = keys.idx_key(wanted.digest), keys.tomb_key(number)
    digest = wanted.digest.encode()
    puts = (
        Put(idx, str(number).encode()),
        Put(keys.id_key(number), wanted.labels.canonical().encode()),
        Put(keys.ref_key(number, node), digest, lease),
    )
    return Txn(
        compares=(
            absent(idx),
            absent(keys.id_key(number)),
            mod_is(tomb, Revision(decision.tomb)),
        ),
        success=(*puts, Delete(tomb)) if decision.tomb else puts,
        failure=(Range(idx),),
    )


def refer(decision: Refer, node: str, lease: LeaseId) -> Txn:
    digest = decision.wanted.digest
    idx = keys.idx_key(digest)
    return Txn(
        compares=(value_is(idx, str(decision.number).encode()),),
        success=(Put(keys.ref_key(decision.number, node), digest.encode(), lease),),
        failure=(Range(idx),),
    )


def guarded(guard: str, items: Iterable[Collectable], quarantine: LeaseId) -> Txn:
    """Its own result fails when `guard` is gone; each nested one when its number is used again."""
    collects = tuple(collect(item, quarantine) for item in items)
    return Txn(compares=(present(guard),), success=collects)


def collect(item: Collectable, quarantine: LeaseId) -> Txn:
    idx, id_ = keys.idx_key(item.digest), keys.id_key(item.number)
    return Txn(
        compares=(
            prefix_empty(keys.refs_of(item.number)),
            mod_is(idx, item.idx_revision),
            mod_is(id_, item.id_revision),
        ),
        success=(
            Delete(idx),
            Delete(id_),
            Put(keys.tomb_key(item.number), item.digest.encode(), quarantine),
        ),
    )


def found_index(result: TxnResult) -> KeyValue | None:
    """What the failure branch of a create or refer read."""
    match result.results:
        case (RangeResult(items=(kv, *_)),):
            return kv
        case _:
            return None
