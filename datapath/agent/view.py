"""What the node knows from its policy subscription: local policies, groups, rules, addresses.

Owns the held state and the question "what changed". Values in, values out: no clock, no network,
no maps. Messages that belong together (`more`) are applied as one; a snapshot replaces everything
held and is diffed against it, so that a reconnect yields only real differences.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pyroaring import BitMap

from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, LocalPolicy, RuleId, RuleSource


@dataclass(frozen=True, slots=True)
class Address:
    """`cidr`: "10.0.0.1" for an endpoint, "10.0.0.0/8" for a prefix."""

    cidr: str
    identity: NumericIdentity
    node: str = ""
    namespace: str = ""
    name: str = ""


@dataclass(frozen=True, slots=True)
class GroupDelta:
    id: GroupId
    added: BitMap
    removed: BitMap


@dataclass(frozen=True, slots=True)
class Update:
    """One message of the stream; see policy.proto for the order inside."""

    revision: int
    snapshot: bool = False
    more: bool = False
    groups: tuple[tuple[GroupId, BitMap], ...] = ()
    group_deltas: tuple[GroupDelta, ...] = ()
    local_policies: tuple[LocalPolicy, ...] = ()
    rules: tuple[RuleSource, ...] = ()
    addresses: tuple[Address, ...] = ()
    addresses_removed: tuple[str, ...] = ()
    local_policies_removed: tuple[NumericIdentity, ...] = ()
    groups_removed: tuple[GroupId, ...] = ()
    rules_removed: tuple[RuleId, ...] = ()
    traceparent: str = ""


@dataclass(frozen=True, slots=True)
class GroupChange:
    added: BitMap
    removed: BitMap


@dataclass(frozen=True, slots=True)
class ViewChange:
    """The net difference of one batch: what was set to the value it had is not in it.
    `left`: identities that an address had and has no more, unless another address came to them."""

    locals: frozenset[NumericIdentity] = frozenset()
    groups: Mapping[GroupId, GroupChange] = field(default_factory=dict)
    addresses_put: tuple[Address, ...] = ()
    addresses_removed: tuple[Address, ...] = ()
    left: BitMap = field(default_factory=BitMap)
    rules: bool = False

    def __bool__(self) -> bool:
        return bool(
            self.locals or self.groups or self.addresses_put or self.addresses_removed or self.rules
        )


K = TypeVar("K")
V = TypeVar("V")


class _Table(Generic[K, V]):
    """A dict that remembers the old value of every key written since `begin`."""

    def __init__(self, rows: Mapping[K, V]) -> None:
        self.rows: dict[K, V] = dict(rows)
        self._old: dict[K, V | None] = {}

    def begin(self) -> None:
        self._old = {}

    def clear(self) -> None:
        for key, value in self.rows.items():
            self._old.setdefault(key, value)
        self.rows = {}

    def set(self, key: K, value: V) -> None:
        self._old.setdefault(key, self.rows.get(key))
        self.rows[key] = value

    def drop(self, key: K) -> None:
        old = self.rows.pop(key, None)
        if old is not None:
            self._old.setdefault(key, old)

    def changes(self) -> Iterable[tuple[K, V | None, V | None]]:
        """(key, before, after) of what really differs; ends the batch."""
        for key, before in self._old.items():
            after = self.rows.get(key)
            if before != after:
                yield key, before, after
        self._old = {}


_NOBODY = BitMap()

# Rules that are gone but that flows of the recent past name.
RETIRED_RULES = 4096


class View:
    """Mutable holder of the newest state; `apply` is its only writer. `generation`: how often it
    has been called."""

    def __init__(
        self,
        *,
        revision: int = 0,
        locals_: Mapping[NumericIdentity, LocalPolicy] | None = None,
        groups: Mapping[GroupId, BitMap] | None = None,
        rules: Mapping[RuleId, RuleSource] | None = None,
        addresses: Mapping[str, Address] | None = None,
    ) -> None:
        self.revision = revision
        self._locals = _Table[NumericIdentity, LocalPolicy](locals_ or {})
        self._groups = _Table[GroupId, BitMap](groups or {})
        self._rules = _Table[RuleId, RuleSource](rules or {})
        self._addresses = _Table[str, Address](addresses or {})
        self._retired: dict[RuleId, RuleSource] = {}
        self.generation = 0

    @property
    def locals(self) -> Mapping[NumericIdentity, LocalPolicy]:
        return self._locals.rows

    @property
    def groups(self) -> Mapping[GroupId, BitMap]:
        return self._groups.rows

    @property
    def rules(self) -> Mapping[RuleId, RuleSource]:
        return self._rules.rows

    @property
    def addresses(self) -> Mapping[str, Address]:
        return self._addresses.rows

    def rule(self, rule_id: int) -> RuleSource | None:
        """Also of a rule that was taken back lately."""
        wanted = RuleId(rule_id)
        return self._rules.rows.get(wanted) or self._retired.get(wanted)

    def apply(self, batch: Sequence[Update]) -> ViewChange:
        """`batch`: the messages up to and including the first without `more`."""
        self.generation += 1
        tables = (self._locals, self._groups, self._rules, self._addresses)
        for table in tables:
            table.begin()
        for update in batch:
            if update.snapshot:
                for table in tables:
                    table.clear()
            self._set(update)
            self._drop(update)
            self.revision = update.revision
        return self._change()

    def _set(self, update: Update) -> None:
        for group, members in update.groups:
            self._groups.set(group, members)
        for delta in update.group_deltas:
            members = self._groups.rows.get(delta.id, _NOBODY)
            self._groups.set(delta.id, (members - delta.removed) | delta.added)
        for rule in update.rules:
            self._rules.set(rule.rule_id, rule)
        for policy in update.local_policies:
            self._locals.set(policy.identity, policy)
        for address in update.addresses:
            self._addresses.set(address.cidr, address)

    def _drop(self, update: Update) -> None:
        for cidr in update.addresses_removed:
            self._addresses.drop(cidr)
        for identity in update.local_policies_removed:
            self._locals.drop(identity)
        for group in update.groups_removed:
            self._groups.drop(group)
        for rule in update.rules_removed:
            self._rules.drop(rule)

    def _change(self) -> ViewChange:
        groups = {}
        for group, before, after in self._groups.changes():
            old, new = before or _NOBODY, after or _NOBODY
            groups[group] = GroupChange(added=new - old, removed=old - new)
        put, removed, left = [], [], BitMap()
        for _, was, now in self._addresses.changes():
            if now is not None:
                put.append(now)
            elif was is not None:
                removed.append(was)
            if was is not None and (now is None or now.identity != was.identity):
                left.add(was.identity)
        return ViewChange(
            locals=frozenset(key for key, _, _ in self._locals.changes()),
            groups=groups,
            addresses_put=tuple(put),
            addresses_removed=tuple(removed),
            left=left - BitMap(address.identity for address in put),
            rules=self._rules_changed(),
        )

    def _rules_changed(self) -> bool:
        changed = False
        for rule_id, before, after in self._rules.changes():
            changed = True
            if after is None and before is not None:
                self._retired[rule_id] = before
        while len(self._retired) > RETIRED_RULES:
            del self._retired[next(iter(self._retired))]
        return changed
