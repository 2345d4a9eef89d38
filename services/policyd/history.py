"""What policies were: a record of every change, and the way back.

    tessera/policyd/history/<kind>/<namespace, or _>/<name>/<16 hex digits>   zlib(JSON)

Written in the transaction of the change itself. The digits are the revision of the counter that the
transaction is guarded by (records.py), so no two changes share them and their order is the order of
changes. The revision at which a change came into force is that of its key. The newest KEPT of each
policy are kept.
"""

from __future__ import annotations

import difflib
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import msgspec

from services.policy.clauses import PolicyRef
from services.policyd.records import path_of, ref_of_path
from services.runtime.errors import Invalid, Retry
from services.runtime.log import logger
from services.store.model import (
    Delete,
    KeyValue,
    Range,
    RangeResult,
    Revision,
    Store,
    prefix_end,
)
from services.store.txn import bulk_txn, results_of

log = logger(__name__)

HISTORY_PREFIX: Final = "tessera/policyd/history/"
KEPT: Final = 50


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`action`: created, configured or deleted."""

    action: str
    manifest: str = ""
    author: str = ""
    changed_at: str = ""


@dataclass(frozen=True, slots=True)
class Change:
    ref: PolicyRef
    revision: Revision
    record: Record
    diff: str = ""


@dataclass(frozen=True, slots=True)
class Return:
    """What to write so that things are as they were."""

    manifests: tuple[tuple[PolicyRef, str], ...]
    gone: tuple[PolicyRef, ...]


def history_of(ref: PolicyRef) -> str:
    return f"{HISTORY_PREFIX}{path_of(ref)}/"


def history_key(ref: PolicyRef, guard: Revision) -> str:
    return f"{history_of(ref)}{guard:016x}"


def encode(record: Record) -> bytes:
    return zlib.compress(msgspec.json.encode(record))


async def read(store: Store, prefix: str = HISTORY_PREFIX) -> dict[PolicyRef, list[Change]]:
    """Oldest first."""
    found: dict[PolicyRef, list[Change]] = {}
    for kv in (await store.list(prefix)).items:
        change = _change(kv)
        if change is not None:
            found.setdefault(change.ref, []).append(change)
    return found


async def trim(store: Store, refs: Iterable[PolicyRef]) -> None:
    """Forgets all but the newest KEPT changes of each. What cannot be done now is done with the
    next change."""
    try:
        await _trim(store, refs)
    except Retry as error:
        log.warning("history.untrimmed", error=str(error))


async def _trim(store: Store, refs: Iterable[PolicyRef]) -> None:
    ranges = [
        Range(prefix, range_end=prefix_end(prefix), keys_only=True)
        for prefix in map(history_of, refs)
    ]
    result = await store.txn(bulk_txn((), ranges))
    surplus = [
        kv.key
        for one in results_of(result)
        if isinstance(one, RangeResult)
        for kv in sorted(one.items, key=lambda kv: kv.key)[:-KEPT]
    ]
    if surplus:
        await store.txn(bulk_txn((), [Delete(key) for key in surplus]))


def with_diffs(changes: Sequence[Change]) -> list[Change]:
    """`changes` of one policy, oldest first. Of the oldest that is kept, what it was before is not
    known: unless it was created then, it has no diff."""
    if not changes:
        return []
    first = changes[0]
    before = "" if first.record.action == "created" else first.record.manifest
    told = [_compared(before, first)]
    told += [_compared(old.record.manifest, new) for old, new in pairwise(changes)]
    return told


def back_to(
    revision: int,
    history: Mapping[PolicyRef, Sequence[Change]],
    now: Mapping[PolicyRef, tuple[Revision, str]],
) -> Return:
    """`history`: oldest first. `now`: revision and manifest of what is stored. Raises `Invalid`
    when it is not known any more what some policy was."""
    manifests, gone = [], []
    for ref in sorted(history.keys() | now.keys()):
        stored = now.get(ref)
        if stored is not None and stored[0] <= revision:
            continue
        was = _as_of(ref, revision, history.get(ref, ()))
        if was is None and stored is not None:
            gone.append(ref)
        elif was is not None and (stored is None or stored[1] != was):
            manifests.append((ref, was))
    return Return(tuple(manifests), tuple(gone))


def _as_of(ref: PolicyRef, revision: int, changes: Sequence[Change]) -> str | None:
    """Its manifest; None: it did not exist."""
    past = [change for change in changes if change.revision <= revision]
    if past:
        record = past[-1].record
        return None if record.action == "deleted" else record.manifest
    if not changes or changes[0].record.action != "created":
        since = f"begins at revision {changes[0].revision}" if changes else "was not recorded then"
        raise Invalid(f"what {ref} was at revision {revision} is not known: its history {since}")
    return None


def _compared(before: str, change: Change) -> Change:
    lines = difflib.unified_diff(
        before.splitlines(), change.record.manifest.splitlines(), "before", "after", lineterm=""
    )
    return Change(change.ref, change.revision, change.record, "\n".join(lines))


def _change(kv: KeyValue) -> Change | None:
    ref = ref_of_path(kv.key.removeprefix(HISTORY_PREFIX).rpartition("/")[0])
    try:
        record = msgspec.json.decode(zlib.decompress(kv.value), type=Record)
    except (zlib.error, msgspec.DecodeError) as error:
        log.warning("store.value_broken", name=kv.key, reason=str(error))
        return None
    return None if ref is None else Change(ref, kv.mod_revision, record)
