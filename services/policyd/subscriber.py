"""One agent's subscription: which identities it follows, what it holds, what it is to be sent.

    follow(add, remove) --+
                          +--> take(): what is held --> what is to be held, as messages
    the log moved on -----+

Keeps no queue: between two calls of `take` only a position in the shared log. However slow the
reader is, the next `take` yields one Update that leads from what was taken last to the newest
state; a snapshot when the log no longer reaches back.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol, TypeVar

from tessera_wire.policy.v1.policy_pb2 import Update

from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, RuleId
from services.policyd.payload import Header, Needs, Payloads, Span, messages
from services.policyd.state import State
from services.runtime.errors import TesseraError


@dataclass(slots=True)
class Counts:
    """Since the start, over all subscriptions. `coalesced`: change-sets that went out as part of
    another's Update."""

    updates: int = 0
    snapshots: int = 0
    coalesced: int = 0


class Source(Protocol):
    """The shared side of distribution, as a subscription sees it."""

    @property
    def state(self) -> State: ...
    @property
    def payloads(self) -> Payloads: ...
    @property
    def counts(self) -> Counts: ...
    @property
    def end(self) -> int:
        """The position behind the newest change-set."""
        ...

    def span(self, position: int) -> Span | None:
        """None: the log no longer reaches back to `position`."""
        ...


class Subscription:
    def __init__(
        self, source: Source, node: str, identities: Iterable[NumericIdentity] = ()
    ) -> None:
        self.node = node
        self.revision = 0
        self.ended = False
        self.error: TesseraError | None = None
        self._source = source
        self._follows: set[NumericIdentity] = set(identities)
        self._holds: dict[NumericIdentity, Needs] = {}
        self._groups: Counter[GroupId] = Counter()
        self._rules: Counter[RuleId] = Counter()
        self._asked: set[NumericIdentity] = set()
        self._position: int | None = None
        self._woken = asyncio.Event()
        self._woken.set()

    @property
    def follows(self) -> frozenset[NumericIdentity]:
        return frozenset(self._follows)

    def follow(
        self, add: Iterable[NumericIdentity], remove: Iterable[NumericIdentity] = ()
    ) -> None:
        """An identity that is added again is answered again."""
        removed, added = set(remove), set(add)
        self._follows = (self._follows - removed) | added
        self._asked |= removed | added
        self.wake()

    def end(self, error: TesseraError | None = None) -> None:
        """The stream is to end, with `error` if there is one. The first call counts."""
        if not self.ended:
            self.ended, self.error = True, error
            self.wake()

    def wake(self) -> None:
        self._woken.set()

    @property
    def is_woken(self) -> bool:
        return self._woken.is_set()

    async def woken(self) -> None:
        await self._woken.wait()

    def take(self) -> Iterator[bytes]:
        """The messages of one Update, or none when there is nothing to say. What they say is
        decided by the time this returns; they are put together as they are iterated."""
        self._woken.clear()
        source = self._source
        self.revision = source.state.revision
        span = None if self._position is None else source.span(self._position)
        position, self._position = self._position, source.end
        if position == source.end and not self._asked:
            return iter(())
        source.counts.updates += 1
        if span is None:
            return self._snapshot()
        self._source.counts.coalesced += span.change.merged - 1
        return self._delta(span)

    # ------------------------------------------------------------------ what to send

    def _snapshot(self) -> Iterator[bytes]:
        self._holds.clear()
        self._groups.clear()
        self._rules.clear()
        self._asked.clear()
        policies, _ = self._exchange(self._follows)
        payloads = self._source.payloads
        parts = [payloads.group(group) for group in self._groups]
        parts += [payloads.rule(rule) for rule in self._rules]
        parts += policies
        parts += payloads.every_address()
        self._source.counts.snapshots += 1
        return messages(Header(self.revision, snapshot=True), parts)

    def _delta(self, span: Span) -> Iterator[bytes]:
        change = span.change
        touched = self._touched(span)
        held = self._groups.keys()
        # A group it holds can be among those that came to be: it went, and came again.
        if not touched and held.isdisjoint(change.deltas) and held.isdisjoint(change.groups):
            return iter(span.plain())
        old_groups, old_rules = set(self._groups), set(self._rules)
        sent, gone = self._exchange(touched)
        payloads = self._source.payloads
        groups, rules = self._groups.keys(), self._rules.keys()
        whole = (groups - old_groups) | (groups & change.groups)
        parts = [payloads.group(group) for group in whole]
        parts += [span.delta(group) for group in (groups & change.deltas.keys()) - whole]
        parts += [payloads.rule(r) for r in (rules - old_rules) | (rules & change.rules)]
        parts += sent
        parts += span.addresses()
        removals = Update(
            local_policies_removed=gone,
            groups_removed=old_groups - groups,
            rules_removed=old_rules - rules,
        )
        parts.append(removals.SerializeToString())
        return messages(Header(self.revision, change.traceparent), parts)

    def _touched(self, span: Span) -> set[NumericIdentity]:
        """Identities to look at again: of those followed, what changed or was asked for; of those
        not followed any more, what was."""
        asked, self._asked = self._asked, set()
        locals_ = span.change.locals
        return asked | {identity for identity in self._follows if identity in locals_}

    def _exchange(self, touched: set[NumericIdentity]) -> tuple[list[bytes], list[NumericIdentity]]:
        """Policies to send and identities to drop, with the references moved accordingly."""
        knows, payloads = self._source.state.resolver.knows, self._source.payloads
        sent, gone = [], []
        for identity in sorted(touched):
            old = self._holds.pop(identity, None)
            if identity in self._follows and knows(identity):
                policy = payloads.policy(identity)
                self._holds[identity] = policy.needs
                self._groups.update(policy.needs.groups)
                self._rules.update(policy.needs.rules)
                sent.append(policy.part)
            elif old is not None:
                gone.append(identity)
            if old is not None:
                _release(self._groups, old.groups)
                _release(self._rules, old.rules)
        return sent, gone


K = TypeVar("K")


def _release(references: Counter[K], keys: Iterable[K]) -> None:
    for key in keys:
        references[key] -= 1
        if not references[key]:
            del references[key]
