"""Numbers for label sets: decide from the view, commit, correct the view, decide again.

    items ──► workload labels ──► one entry per distinct set
                                     │ decide (identity.allocate)
          ┌──────────────────────────┤
          │  Create / Refer ──► Committer ──► succeeded: done
          │                              └──► lost: the view learns what the store holds ──┐
          └────────────────────────────────────────────────────────────────────────────────┘

A set that another call is creating is not raced for: this call waits and then refers to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from identity import labels as label_sets
from identity.allocate import Create, Refer, Wanted, decide, workload_labels
from identity.configured import ConfiguredIdentities
from identity.labels import Labels
from identity.numbers import UNKNOWN, NumericIdentity
from services.identityd.guard import Guard
from services.identityd.rules import RulesInForce
from services.identityd.stats import Counts
from services.identityd.telling import Telling
from services.identityd.txns import TxnResult, found_index, of_decision
from services.identityd.view import IdentityView
from services.runtime.clock import Clock
from services.runtime.errors import (
    Conflict,
    Exhausted,
    Invalid,
    NotFound,
    TesseraError,
)
from services.runtime.log import logger
from services.store.commit import Committer, Outcome
from services.store.model import LeaseId, Revision

log = logger(__name__)

# Each round loses only to a writer that got further; more rounds mean a store edited by hand.
ROUNDS: Final = 16
# Label sets of which it is remembered what becomes of them; some 2 kB each.
MOST_WORKLOADS: Final = 16_384
NEVER_STORED: Final = Revision(0)


@dataclass(frozen=True, slots=True)
class Item:
    """`labels` as the node gave them, each "source:key=value"; `previous` 0 for none."""

    labels: tuple[str, ...]
    previous: NumericIdentity = UNKNOWN


@dataclass(frozen=True, slots=True)
class Allocated:
    """`revision`: since when the set has the number; 0 for one that is never stored."""

    number: NumericIdentity
    labels: Labels
    remapped: bool
    revision: Revision = NEVER_STORED


@dataclass(frozen=True, slots=True)
class _Workload:
    """`standing`: the number of an identity that is never stored."""

    labels: Labels
    digest: str
    standing: NumericIdentity | None


@dataclass(slots=True)
class _Call:
    """What one `allocate` still wants, by digest, and what it has got."""

    node: str
    lease: LeaseId
    pending: dict[str, Wanted] = field(default_factory=dict)
    settled: dict[str, NumericIdentity | TesseraError] = field(default_factory=dict)
    created: list[tuple[NumericIdentity, Labels]] = field(default_factory=list)
    failure: TesseraError | None = None

    def settle(self, digest: str, result: NumericIdentity | TesseraError) -> None:
        del self.pending[digest]
        self.settled[digest] = result


class Allocator:
    def __init__(
        self,
        view: IdentityView,
        committer: Committer,
        counts: Counts,
        clock: Clock,
        *,
        cluster: str,
        rules: RulesInForce,
        configured: ConfiguredIdentities,
    ) -> None:
        self._view = view
        self._committer = committer
        self._counts = counts
        self._cluster = cluster
        self._rules = rules
        self.guard = Guard(lambda: view.usage, view.under_way, lambda: rules.rules)
        self._configured = configured
        self._telling = Telling(clock)
        # By the texts they were asked for with, under the rules of `_version`.
        self._workloads: dict[tuple[str, ...], _Workload] = {}
        self._version = rules.version
        # Sets that a call of this process is creating right now.
        self._creating: dict[str, asyncio.Event] = {}

    async def allocate(
        self, node: str, lease: LeaseId, items: Sequence[Item]
    ) -> list[Allocated | TesseraError]:
        """In the order of `items`; what is wrong with one item is its result.

        Raises `NotFound` when the lease is gone and `Retry` when the store is: then nothing is
        known about any item, and the call may be repeated as it is.
        """
        await self._view.ready()
        await self._rules.ready()
        prepared = [self._prepare(item) for item in items]
        call = _Call(node, lease)
        for wanted in prepared:
            if isinstance(wanted, Wanted):
                call.pending.setdefault(wanted.digest, wanted)
        for _ in range(ROUNDS):
            if not call.pending:
                break
            await self._round(call)
        for digest, wanted in tuple(call.pending.items()):
            call.settle(digest, _too_many_rounds(wanted))
        if call.created:
            self._telling.created(node, call.created)
        return [self._result(wanted, call) for wanted in prepared]

    def _prepare(self, item: Item) -> Wanted | Allocated | TesseraError:
        workload = self._workload(item.labels)
        match workload:
            case _Workload(labels=labels, standing=int(number)):
                return Allocated(number, labels, item.previous not in (UNKNOWN, number))
            case _Workload(labels=labels, digest=digest):
                return Wanted(labels, digest, item.previous)
            case _:
                return workload

    def _workload(self, texts: tuple[str, ...]) -> _Workload | Invalid:
        """Sets repeat: a node asks for the same ones with every endpoint of a deployment."""
        if self._version != self._rules.version or len(self._workloads) >= MOST_WORKLOADS:
            self._version = self._rules.version
            self._workloads.clear()
        known = self._workloads.get(texts)
        if known is None:
            try:
                known = self._workloads[texts] = self._read(texts)
            except label_sets.Invalid as error:
                return Invalid(str(error))
        return known

    def _read(self, texts: tuple[str, ...]) -> _Workload:
        given = Labels.parse(texts)
        fixed = self._configured.fixed_number(given)
        if fixed is not None:
            return _Workload(self._configured.labels[fixed], "", fixed)
        kept = workload_labels(given, self._cluster, self._rules.apply)
        return _Workload(kept, kept.digest(), self._configured.number_of(kept))

    async def _round(self, call: _Call) -> None:
        decisions: list[Create | Refer] = []
        awaited: list[asyncio.Event] = []
        mine = asyncio.Event()
        for wanted in tuple(call.pending.values()):
            underway = self._creating.get(wanted.digest)
            if underway is not None:
                awaited.append(underway)
                continue
            decision = self._decide(wanted)
            if isinstance(decision, Exhausted):
                call.settle(wanted.digest, decision)
                continue
            if isinstance(decision, Create):
                self._creating[wanted.digest] = mine
                self._view.expecting(decision.number, wanted)
            decisions.append(decision)
        try:
            txns = [of_decision(decision, call.node, call.lease) for decision in decisions]
            outcomes = await self._committer.submit(txns, call.lease)
            for decision, outcome in zip(decisions, outcomes, strict=True):
                self._learn(call, decision, outcome)
        finally:
            self._finish(decisions, mine)
        if call.failure is not None:
            raise call.failure
        for event in awaited:
            await event.wait()

    def _decide(self, wanted: Wanted) -> Create | Refer | Exhausted:
        known = self._view.number_of(wanted.digest)
        if known is None:
            refusal = self.guard.refusal(wanted.labels)
            if refusal is not None:
                return refusal
        decision = decide(wanted, known, self._view.free, self._view)
        return self._exhausted() if decision is None else decision

    def _learn(self, call: _Call, decision: Create | Refer, outcome: Outcome) -> None:
        wanted, number = decision.wanted, decision.number
        if isinstance(outcome, TesseraError):
            self._give_back(decision)
            call.failure = _of_call(outcome, call)
            return
        if outcome.succeeded:
            self._succeeded(call, decision, outcome)
            return
        self._counts.conflicts += 1
        if isinstance(decision, Create):
            self._view.not_created(number)
        found = found_index(outcome)
        self._view.corrected(wanted.digest, found)
        if found is not None:
            self._give_back(decision)
        elif isinstance(decision, Create) and wanted.previous == number:
            # Taken by other labels, or in quarantine after all: any other number will do. The
            # claim stays until the watch tells what holds the number.
            call.pending[wanted.digest] = Wanted(wanted.labels, wanted.digest)

    def _succeeded(self, call: _Call, decision: Create | Refer, outcome: TxnResult) -> None:
        wanted, number = decision.wanted, decision.number
        if isinstance(decision, Create):
            self._view.created(number, wanted, outcome.revision)
            self._counts.created += 1
            self.guard.created(wanted.labels)
            call.created.append((number, wanted.labels))
            if decision.tomb and wanted.previous != number:
                self._counts.reused_early += 1
                log.warning("identity.reused_early", identity=number, labels=str(wanted.labels))
        else:
            self._counts.referred += 1
        call.settle(wanted.digest, number)

    def _give_back(self, decision: Create | Refer) -> None:
        if isinstance(decision, Refer):
            return
        self._view.not_created(decision.number)
        if decision.tomb:
            self._view.quarantine.give_back(decision.number)
        else:
            self._view.free.give_back(decision.number)

    def _finish(self, decisions: Sequence[Create | Refer], mine: asyncio.Event) -> None:
        for decision in decisions:
            digest = decision.wanted.digest
            if self._creating.get(digest) is mine:
                del self._creating[digest]
        mine.set()

    def _exhausted(self) -> Exhausted:
        view = self._view
        return Exhausted(
            f"cluster {self._cluster!r} has no identity number left: of {view.free.total},"
            f" {view.in_use} are in use and {view.in_quarantine} in quarantine; labels that differ"
            " per instance use one each, so have the label filter ignore them"
            " (GET /v1/identities shows the sets), or stop workloads that are not needed"
        )

    def _result(
        self, prepared: Wanted | Allocated | TesseraError, call: _Call
    ) -> Allocated | TesseraError:
        match prepared:
            case Wanted(labels=labels, digest=digest, previous=previous):
                settled = call.settled[digest]
                if not isinstance(settled, TesseraError):
                    remapped = previous not in (UNKNOWN, settled)
                    since = self._view.idx_revision(digest)
                    return Allocated(settled, labels, remapped, since)
                self._counts.refused += 1
                return settled
            case Allocated():
                return prepared
            case _:
                self._counts.refused += 1
                return prepared


def _of_call(outcome: TesseraError, call: _Call) -> TesseraError:
    return lost_session(call.node, call.lease) if isinstance(outcome, NotFound) else outcome


def lost_session(node: str, lease: LeaseId) -> NotFound:
    return NotFound(
        f"lease {lease} of node {node!r} is gone; open a new session and publish everything again"
    )


def _too_many_rounds(wanted: Wanted) -> Conflict:
    return Conflict(
        f"labels '{wanted.labels}': {ROUNDS} attempts to allocate lost to other writers; try again"
    )
