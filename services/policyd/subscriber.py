"""One agent's subscription: which identities it follows, what it holds, what it is to be sent.

    follow(add, remove) --+
                          +--> take(): what is held --> what is to be held, as messages
    the log moved on -----+

Keeps no queue: between two calls of `take` only a position in the shared log. However slow the
reader is, the next `take` yields one Update that leads from what was taken last to the newest
state; a snapshot when the log no longer reaches back. An agent that tells what it holds, at the
start or because it missed something, gets what differs from that.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from tessera_wire.policy.v1.policy_pb2 import Digests, Forget, Update

from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, RuleId
from services.policyd.payload import EncodedPolicy, Header, Payloads, Span
from services.policyd.state import State
from services.runtime.errors import TesseraError
from services.wire.held import NOTHING, Held, total


@dataclass(slots=True)
class Counts:
    """Since the start, over all subscriptions. `coalesced`: change-sets that went out as part of
    another's Update."""

    updates: int = 0
    snapshots: int = 0
    resumed: int = 0
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

    @property
    def instance(self) -> str: ...

    def span(self, position: int) -> Span | None:
        """None: the log no longer reaches back to `position`."""
        ...

    def position_of(self, instance: str, revision: int) -> int | None:
        """None: the log does not lead on from there."""
        ...


class Subscription:
    def __init__(
        self,
        source: Source,
        node: str,
        identities: Iterable[NumericIdentity] = (),
        held: Held = NOTHING,
    ) -> None:
        """`held`: what the agent has of earlier streams."""
        self.node = node
        self.revision = 0
        self.ended = False
        self.error: TesseraError | None = None
        self._source = source
        self._follows: set[NumericIdentity] = set(identities)
        self._holds: dict[NumericIdentity, EncodedPolicy] = {}
        self._groups: Counter[GroupId] = Counter()
        self._rules: Counter[RuleId] = Counter()
        self._asked: set[NumericIdentity] = set()
        self._position: int | None = None
        self._told: Held | None = None if held == NOTHING else held
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

    def lost(self, held: Held) -> None:
        """The agent is not where it should be; `held` is all it has. It waits for the answer, so
        its revision says nothing about its addresses."""
        self._told = replace(held, instance="")
        self._position = None
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
            told, self._told = self._told, None
            return self._snapshot() if told is None or told == NOTHING else self._resumed(told)
        self._source.counts.coalesced += span.change.merged - 1
        return self._delta(span)

    # ------------------------------------------------------------------ what to send

    def _snapshot(self) -> Iterator[bytes]:
        policies = self._from_nothing()
        payloads = self._source.payloads
        parts = [payloads.group(group) for group in self._groups]
        parts += [payloads.rule(rule).part for rule in self._rules]
        parts += [policy.part for policy in policies.values()]
        self._source.counts.snapshots += 1
        header = self._beginning(snapshot=True)
        return payloads.messages(header, parts, payloads.every_address())

    def _resumed(self, told: Held) -> Iterator[bytes]:
        """Of policies, groups and addresses those that differ; rules, which are small, all or
        none."""
        policies = self._from_nothing()
        payloads = self._source.payloads
        parts = [
            payloads.group(group)
            for group in self._groups
            if told.groups.get(group) != payloads.group_digest(group)
        ]
        other_rules = payloads.rules_digest(self._rules) != told.rules
        if other_rules:
            parts += [payloads.rule(rule).part for rule in self._rules]
        parts += [
            policy.part
            for identity, policy in policies.items()
            if told.identities.get(identity) != policy.digest
        ]
        addresses, forgotten = self._addresses_since(told)
        parts += addresses
        removals = Update(
            local_policies_removed=told.identities.keys() - policies.keys(),
            groups_removed=told.groups.keys() - self._groups.keys(),
        )
        parts.append(removals.SerializeToString())
        self._source.counts.resumed += 1
        forget = Forget(rules=other_rules, addresses=forgotten)
        return payloads.messages(self._beginning(forget=forget), parts)

    def _addresses_since(self, told: Held) -> tuple[list[bytes], list[int]]:
        """Parts, and the buckets to forget before they are applied."""
        position = self._source.position_of(told.instance, told.revision)
        span = None if position is None else self._source.span(position)
        if span is not None:
            return span.addresses(), []
        addresses = self._source.payloads.addresses
        differing = addresses.differing(told.addresses)
        return [addresses.bucket(number) for number in differing], differing

    def _beginning(self, *, snapshot: bool = False, forget: Forget | None = None) -> Header:
        addresses = self._source.payloads.addresses.digest
        return Header(
            self.revision,
            snapshot=snapshot,
            resumed=not snapshot,
            instance=self._source.instance,
            forget=forget,
            digests=Digests(policy=self._digest(), addresses=addresses),
        )

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
        parts += [payloads.rule(r).part for r in (rules - old_rules) | (rules & change.rules)]
        parts += [policy.part for policy in sent.values()]
        parts += span.addresses()
        removals = Update(
            local_policies_removed=gone,
            groups_removed=old_groups - groups,
            rules_removed=old_rules - rules,
        )
        parts.append(removals.SerializeToString())
        return payloads.messages(span.header(self._digest()), parts)

    def _digest(self) -> int:
        """Of all policies, groups and rules it holds once it has applied what is being made."""
        payloads = self._source.payloads
        digests = [policy.digest for policy in self._holds.values()]
        digests += map(payloads.group_digest, self._groups)
        digests.append(payloads.rules_digest(self._rules))
        return total(digests)

    def _from_nothing(self) -> dict[NumericIdentity, EncodedPolicy]:
        self._holds.clear()
        self._groups.clear()
        self._rules.clear()
        self._asked.clear()
        policies, _ = self._exchange(self._follows)
        return policies

    def _touched(self, span: Span) -> set[NumericIdentity]:
        """Identities to look at again: of those followed, what changed or was asked for; of those
        not followed any more, what was."""
        asked, self._asked = self._asked, set()
        locals_ = span.change.locals
        return asked | {identity for identity in self._follows if identity in locals_}

    def _exchange(
        self, touched: set[NumericIdentity]
    ) -> tuple[dict[NumericIdentity, EncodedPolicy], list[NumericIdentity]]:
        """Policies to send and identities to drop, with the references moved accordingly."""
        knows, payloads = self._source.state.resolver.knows, self._source.payloads
        sent, gone = {}, []
        for identity in sorted(touched):
            old = self._holds.pop(identity, None)
            if identity in self._follows and knows(identity):
                policy = payloads.policy(identity)
                self._holds[identity] = policy
                self._groups.update(policy.needs.groups)
                self._rules.update(policy.needs.rules)
                sent[identity] = policy
            elif old is not None:
                gone.append(identity)
            if old is not None:
                _release(self._groups, old.needs.groups)
                _release(self._rules, old.needs.rules)
        return sent, gone


K = TypeVar("K")


def _release(references: Counter[K], keys: Iterable[K]) -> None:
    for key in keys:
        references[key] -= 1
        if not references[key]:
            del references[key]
