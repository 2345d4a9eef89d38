"""What the node knows from its policy subscription: local policies, groups, rules, addresses.

Owns the held state and the question "what changed". Values in, values out: no clock, no network,
no maps. Messages that belong together (`more`) are applied as one; a snapshot replaces everything
held and is diffed against it, so that a reconnect yields only real differences.

A batch that does not lead on from what is held, or that does not end with what its sender says is
held then, is `OutOfStep`: nothing of it shows in any change, and only a snapshot or an answer to
`holding` (`resumed`) is taken from there on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from pyroaring import BitMap

from datapath.agent.digests import ViewDigests
from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, LocalPolicy, RuleId, RuleSource
from services.runtime.log import logger
from services.wire.held import BUCKETS, Held, bucket_of, digest_of_address, total

log = logger(__name__)


@dataclass(frozen=True, slots=True)
class Address:
    """`cidr`: "10.0.0.1" for an endpoint, "10.0.0.0/8" for a prefix."""

    cidr: str
    identity: NumericIdentity
    node: str = ""
    namespace: str = ""
    name: str = ""
    digest: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        digest = digest_of_address(self.cidr, self.identity, self.node, self.namespace, self.name)
        object.__setattr__(self, "digest", digest)  # frozen: set once, here


@dataclass(frozen=True, slots=True)
class AddressColumns:
    """Many addresses, as they are added where none of them is: by `cidr`, and digests by bucket."""

    rows: Mapping[str, Address]
    digests: tuple[int, ...]

    @classmethod
    def of(cls, addresses: Sequence[Address]) -> AddressColumns:
        digests = [0] * BUCKETS
        for address in addresses:
            digests[bucket_of(address.cidr)] += address.digest
        return cls({a.cidr: a for a in addresses}, tuple(total((each,)) for each in digests))


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
    resumed: bool = False
    after: int = 0
    instance: str = ""
    forget_rules: bool = False
    forget_addresses: tuple[int, ...] = ()
    columns: AddressColumns | None = None
    policy_digest: int | None = None
    addresses_digest: int | None = None

    @property
    def is_whole(self) -> bool:
        """It is right whatever came before."""
        return self.snapshot or self.resumed


class OutOfStep(Exception):
    """Something was missed, or is held that should not be. Ask for what differs."""


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
    """A dict that remembers the old value of every key written since `changes`."""

    def __init__(self, rows: Mapping[K, V]) -> None:
        self.rows: dict[K, V] = dict(rows)
        self._old: dict[K, V | None] = {}

    def clear(self) -> None:
        for key, value in self.rows.items():
            self._old.setdefault(key, value)
        self.rows = {}

    def set(self, key: K, value: V) -> None:
        self._old.setdefault(key, self.rows.get(key))
        self.rows[key] = value

    def fill(self, rows: Mapping[K, V]) -> None:
        """As `set` of each; none of them is there."""
        if self._old:
            for key in rows:
                self._old.setdefault(key, None)
        else:
            self._old = dict.fromkeys(rows)
        self.rows.update(rows)

    def drop(self, key: K) -> None:
        old = self.rows.pop(key, None)
        if old is not None:
            self._old.setdefault(key, old)

    def changes(self) -> Iterable[tuple[K, V | None, V | None]]:
        """(key, before, after) of what really differs; begins anew."""
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
    has been called. `instance`: whose revisions these are."""

    def __init__(
        self,
        *,
        revision: int = 0,
        locals_: Mapping[NumericIdentity, LocalPolicy] | None = None,
        groups: Mapping[GroupId, BitMap] | None = None,
        rules: Mapping[RuleId, RuleSource] | None = None,
        addresses: Mapping[str, Address] | None = None,
        instance: str = "",
    ) -> None:
        self.revision = revision
        self.instance = instance
        self._locals = _Table[NumericIdentity, LocalPolicy](locals_ or {})
        self._groups = _Table[GroupId, BitMap](groups or {})
        self._rules = _Table[RuleId, RuleSource](rules or {})
        self._addresses = _Table[str, Address](addresses or {})
        self._tables = (self._locals, self._groups, self._rules, self._addresses)
        self._retired: dict[RuleId, RuleSource] = {}
        self._digests = ViewDigests()
        for address in self._addresses.rows.values():
            self._digests.replaced(None, address)
        self._astray = False
        self._refused: int | None = None
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

    def holding(self) -> Held:
        """All there is, for whoever is to tell what differs."""
        return Held(
            instance=self.instance,
            revision=self.revision,
            identities=dict(self._digests.identities(self._locals.rows)),
            groups=dict(self._digests.groups(self._groups.rows)),
            rules=self._digests.rules(self._rules.rows),
            addresses=self._digests.addresses if self._addresses.rows else (),
        )

    def lost(self) -> None:
        """A stream ended: what comes next must not be taken for its continuation."""
        self._astray = True

    def apply(self, batch: Sequence[Update]) -> ViewChange:
        """`batch`: the messages up to and including the first without `more`. Raises `OutOfStep`;
        what it changed then shows in the next change."""
        first, last = batch[0], batch[-1]
        if self._is_repeated(first):
            return ViewChange()
        self._check_order(batch)
        self.generation += 1
        for update in batch:
            self._forget(update)
            self._set(update)
            self._drop(update)
        self.revision = last.revision
        self.instance = first.instance if first.is_whole else self.instance
        self._check_digests(first, last)
        self._astray = False
        return self._change()

    def _is_repeated(self, first: Update) -> bool:
        """Interest is answered at the revision that is held; only what leads there is old."""
        if self._astray or first.snapshot:
            return False
        if first.resumed:
            return first.revision < self.revision
        return bool(first.after) and first.after < first.revision <= self.revision

    def _check_order(self, batch: Sequence[Update]) -> None:
        first = batch[0]
        if self._astray and not first.is_whole:
            raise OutOfStep("what differs was asked for and has not come yet")
        problem = ""
        if any((u.revision, u.after) != (first.revision, first.after) for u in batch):
            problem = f"the end of the Update of revision {first.revision} is missing"
        elif first.after and first.after != self.revision:
            problem = f"an Update leads on from revision {first.after}; {self.revision} is held"
        if problem:
            self._astray = True
            raise OutOfStep(problem)

    def _check_digests(self, first: Update, last: Update) -> None:
        problem = ""
        addresses, policy = last.addresses_digest, last.policy_digest
        if addresses is not None and addresses != total(self._digests.addresses):
            problem = "addresses"
        elif policy is not None and policy != self._policy_digest():
            problem = "policies"
        if not problem:
            return
        if first.snapshot and self._came_twice():
            # Every byte of it arrived; a sender of another version digests otherwise.
            log.warning("view.digest_unknown", name=problem, revision=self.revision)
            return
        self._astray = True
        raise OutOfStep(f"the {problem} of revision {self.revision} are not what policyd has")

    def _came_twice(self) -> bool:
        """Whether the last snapshot that was refused held the same."""
        held = total((self._policy_digest(), *self._digests.addresses))
        before, self._refused = self._refused, held
        return before == held

    def _policy_digest(self) -> int:
        found = self._digests
        identities = found.identities(self._locals.rows).values()
        groups = found.groups(self._groups.rows).values()
        return total((*identities, *groups, found.rules(self._rules.rows)))

    def _forget(self, update: Update) -> None:
        if update.snapshot:
            for table in self._tables:
                table.clear()
            self._digests.clear()
        if update.forget_rules:
            self._rules.clear()
            self._digests.rules_changed()
        if update.forget_addresses:
            buckets = frozenset(update.forget_addresses)
            for cidr in [c for c in self._addresses.rows if bucket_of(c) in buckets]:
                self._drop_address(cidr)

    def _set(self, update: Update) -> None:
        for group, members in update.groups:
            self._set_group(group, members)
        for delta in update.group_deltas:
            members = self._groups.rows.get(delta.id, _NOBODY)
            self._set_group(delta.id, (members - delta.removed) | delta.added)
        for rule in update.rules:
            self._rules.set(rule.rule_id, rule)
        for policy in update.local_policies:
            self._locals.set(policy.identity, policy)
            self._digests.identity_changed(policy.identity)
        many = update.columns
        if many is not None and self._addresses.rows.keys().isdisjoint(many.rows):
            self._addresses.fill(many.rows)
            self._digests.came(many.digests)
        else:
            for address in update.addresses:
                self._digests.replaced(self._addresses.rows.get(address.cidr), address)
                self._addresses.set(address.cidr, address)
        if update.rules or update.rules_removed:
            self._digests.rules_changed()

    def _set_group(self, group: GroupId, members: BitMap) -> None:
        self._groups.set(group, members)
        self._digests.group_changed(group)

    def _drop_address(self, cidr: str) -> None:
        self._digests.replaced(self._addresses.rows.get(cidr), None)
        self._addresses.drop(cidr)

    def _drop(self, update: Update) -> None:
        for cidr in update.addresses_removed:
            self._drop_address(cidr)
        for identity in update.local_policies_removed:
            self._locals.drop(identity)
            self._digests.identity_changed(identity)
        for group in update.groups_removed:
            self._groups.drop(group)
            self._digests.group_changed(group)
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
