"""Writing policies: what a request means for what is stored, and the transaction that does it.

    manifests --parse--> policies --+
    stored records, next_rule ------+--> plan --> Plan --> one transaction, or read and plan again

All of a request or none of it, with its record in the history. Unchanged documents are not written
and keep their rule ids. What is stored is taken from what the watch has shown: the transaction
fails where that is out of date. An answer that writes nothing is checked by nothing, so it is given
by what the store itself says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final, Protocol

from services.policy.clauses import PolicyRef, RuleId
from services.policy.parse import ParsedPolicy
from services.policy.resolve import rule_count
from services.policyd import history, records
from services.policyd.records import NEXT_RULE_KEY, Held, Old, PolicyRecord, object_key
from services.runtime.clock import Clock
from services.runtime.errors import Conflict, Exhausted, Invalid
from services.runtime.log import logger
from services.runtime.tracing import current_traceparent, span
from services.store.model import (
    Delete,
    Operation,
    Put,
    Range,
    RangeResult,
    Revision,
    Store,
)
from services.store.txn import MAX_REQUEST_BYTES, bulk_txn, mod_is, results_of

log = logger(__name__)

# Every writer of policies contends for one key; losing this often in a row means a crowd.
ATTEMPTS: Final = 8
# What a key and its framing add to a value in a request, rounded up.
_OVERHEAD_BYTES: Final = 64
_LAST_RULE: Final = 2**32 - 1


@dataclass(frozen=True, slots=True)
class Applied:
    """`action`: created, configured, unchanged or deleted."""

    ref: PolicyRef
    action: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """`revision`: at which all of it is in the store; 0 when nothing was to be stored."""

    revision: int
    applied: tuple[Applied, ...]
    not_found: tuple[PolicyRef, ...] = ()


class Watched(Protocol):
    """What the store held, as of a revision that was watched."""

    def held(self, refs: Iterable[PolicyRef]) -> Held: ...


@dataclass(frozen=True, slots=True)
class Origin:
    """Recorded with each policy."""

    author: str
    applied_at: str
    traceparent: str


@dataclass(frozen=True, slots=True)
class Plan:
    """`puts`, `deletes`: keys. `written`: what the history is told."""

    puts: Mapping[str, bytes]
    deletes: tuple[str, ...]
    written: Mapping[PolicyRef, history.Record]
    applied: tuple[Applied, ...]
    next_rule: RuleId
    unchanged_at: int
    """The newest revision among the documents that are not written."""


def plan(
    policies: Sequence[ParsedPolicy], held: Held, origin: Origin, gone: Sequence[PolicyRef] = ()
) -> Plan:
    """`gone`: to be deleted. Raises `Exhausted` when the rule ids are used up."""
    rule = records.next_rule(held.counter)
    puts: dict[str, bytes] = {}
    written: dict[PolicyRef, history.Record] = {}
    applied = []
    unchanged_at = 0
    for parsed in policies:
        ref = parsed.policy.ref
        old = held.policies.get(ref)
        if old is not None and _unchanged(old, parsed):
            applied.append(Applied(ref, "unchanged"))
            unchanged_at = max(unchanged_at, old.revision)
            continue
        count = rule_count(parsed.policy)
        record = PolicyRecord(
            manifest=parsed.manifest_text,
            rule_base=rule,
            rule_count=count,
            author=origin.author,
            applied_at=origin.applied_at,
            traceparent=origin.traceparent,
        )
        action = "created" if old is None else "configured"
        puts[object_key(ref)] = records.encode(record)
        written[ref] = history.Record(
            action, parsed.manifest_text, origin.author, origin.applied_at
        )
        applied.append(Applied(ref, action))
        rule = RuleId(rule + count)
    if rule > _LAST_RULE:
        raise Exhausted(f"rule ids end at {_LAST_RULE}, and {rule} would be needed")
    deleted = [ref for ref in gone if ref in held.policies]
    for ref in deleted:
        written[ref] = history.Record("deleted", "", origin.author, origin.applied_at)
        applied.append(Applied(ref, "deleted"))
    return Plan(puts, tuple(map(object_key, deleted)), written, tuple(applied), rule, unchanged_at)


def _unchanged(old: Old, parsed: ParsedPolicy) -> bool:
    """A record that cannot be read is changed by any document."""
    return old.manifest == parsed.manifest_text and old.rule_count == rule_count(parsed.policy)


class Policies:
    """The policies in the store, written."""

    def __init__(self, store: Store, watched: Watched, clock: Clock) -> None:
        self._store = store
        self._watched = watched
        self._clock = clock

    async def preview(
        self, policies: Sequence[ParsedPolicy], gone: Sequence[PolicyRef] = ()
    ) -> Outcome:
        held = await self._read([*(parsed.policy.ref for parsed in policies), *gone])
        return Outcome(0, plan(policies, held, Origin("", "", ""), gone).applied)

    async def apply(
        self,
        policies: Sequence[ParsedPolicy],
        author: str,
        gone: Sequence[PolicyRef] = (),
        expected: Set[int] = frozenset(),
    ) -> Outcome:
        """All of `policies`, and none of `gone`. `expected`: revisions of which each must have one
        (0: it must not exist), else `Conflict`; empty: any."""
        with span("policyd.apply", policies=len(policies)):
            return await self._change(policies, tuple(dict.fromkeys(gone)), author, expected)

    async def delete(
        self, refs: Sequence[PolicyRef], author: str, expected: Set[int] = frozenset()
    ) -> Outcome:
        return await self._change((), tuple(dict.fromkeys(refs)), author, expected)

    async def _change(
        self,
        policies: Sequence[ParsedPolicy],
        gone: tuple[PolicyRef, ...],
        author: str,
        expected: Set[int],
    ) -> Outcome:
        now = datetime.fromtimestamp(self._clock.now_s(), UTC)
        changed_at = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        origin = Origin(author, changed_at, current_traceparent())
        refs = [*(parsed.policy.ref for parsed in policies), *gone]
        # What the watch has shown may be old; whoever expects a revision is answered by the store.
        held = await self._read(refs) if expected else self._watched.held(refs)
        _check(held, refs, expected)
        planned = plan(policies, held, origin, gone)
        for attempt in range(ATTEMPTS):
            if attempt or not planned.written:
                held = await self._read(refs)
                _check(held, refs, expected)
                planned = plan(policies, held, origin, gone)
            not_found = tuple(ref for ref in gone if ref not in held.policies)
            if not planned.written:
                return Outcome(planned.unchanged_at, planned.applied, not_found)
            revision = await self._write(held, planned)
            if revision is not None:
                _log_soon(planned.applied, author, revision)
                await history.trim(self._store, planned.written)
                return Outcome(revision, planned.applied, not_found)
        raise _too_many_writers()

    async def _read(self, refs: Sequence[PolicyRef]) -> Held:
        """All of it at one revision."""
        keys = [NEXT_RULE_KEY, *map(object_key, refs)]
        result = await self._store.txn(bulk_txn((), [Range(key) for key in keys]))
        ranges = (one for one in results_of(result) if isinstance(one, RangeResult))
        found = {kv.key: kv for range_ in ranges for kv in range_.items}
        held = {ref: records.old(found[key]) for ref in refs if (key := object_key(ref)) in found}
        return Held(held, found.get(NEXT_RULE_KEY))

    async def _write(self, held: Held, planned: Plan) -> Revision | None:
        """None: somebody else wrote a policy in between."""
        counter = Revision(0) if held.counter is None else held.counter.mod_revision
        puts = dict(planned.puts)
        for ref, record in planned.written.items():
            puts[history.history_key(ref, counter)] = history.encode(record)
        _refuse_too_large(puts, len(planned.written))
        operations: list[Operation] = [Put(key, value) for key, value in puts.items()]
        operations += map(Delete, planned.deletes)
        operations.append(Put(NEXT_RULE_KEY, str(planned.next_rule).encode()))
        result = await self._store.txn(bulk_txn([mod_is(NEXT_RULE_KEY, counter)], operations))
        return result.revision if result.succeeded else None


def _refuse_too_large(puts: Mapping[str, bytes], policies: int) -> None:
    size = sum(len(key) + len(value) + _OVERHEAD_BYTES for key, value in puts.items())
    if size > MAX_REQUEST_BYTES:
        raise Invalid(
            f"{policies} policies of {size} bytes together do not fit into one transaction"
            f" of the store ({MAX_REQUEST_BYTES} bytes); apply them in smaller groups"
        )


def _log_soon(applied: Iterable[Applied], author: str, revision: Revision) -> None:
    """Behind what is ready to run: the change on its way to the nodes."""
    asyncio.get_running_loop().call_soon(_log_written, applied, author, revision)


def _log_written(applied: Iterable[Applied], author: str, revision: Revision) -> None:
    for one in applied:
        if one.action != "unchanged":
            log.info(
                "policy.written",
                policy=str(one.ref),
                state=one.action,
                source=author,
                revision=revision,
            )


def _check(held: Held, refs: Iterable[PolicyRef], expected: Set[int]) -> None:
    for ref in refs if expected else ():
        old = held.policies.get(ref)
        revision = 0 if old is None else old.revision
        if revision not in expected:
            is_now = f"is now at revision {revision}" if revision else "does not exist"
            wanted = " or ".join(str(one) for one in sorted(expected) if one) or "nothing"
            raise Conflict(f"policy {ref} {is_now}, where {wanted} was expected; read it again")


def _too_many_writers() -> Conflict:
    return Conflict(f"policies were changed by others {ATTEMPTS} times meanwhile; apply again")
