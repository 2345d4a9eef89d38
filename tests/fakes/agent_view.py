"""What an agent holds after the Updates it was sent, and whether they kept the protocol's rules.

Rules checked at every message and every completed Update: revisions never fall; the first message
of a stream is a snapshot, and no message inside an Update is but its first; deltas name groups that
are held and say only what differs; every local policy's groups and rules are held and no others;
an address whose identity a held group's selector chooses finds it among the group's members.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from pyroaring import BitMap
from tessera_wire.policy.v1.policy_pb2 import LocalPolicy, Rule, Update

from identity.labels import Labels
from identity.selector import Selector
from services.policy.clauses import FIRST_CLAUSE_RULE
from services.wire.convert import unpack_ids

Address = tuple[int, str, str, str]


@dataclass(slots=True)
class Held:
    """Comparable: two agents that hold the same are equal."""

    locals: dict[int, LocalPolicy] = field(default_factory=dict)
    groups: dict[int, BitMap] = field(default_factory=dict)
    selectors: dict[int, str] = field(default_factory=dict)
    rules: dict[int, Rule] = field(default_factory=dict)
    addresses: dict[str, Address] = field(default_factory=dict)


class AgentView:
    """`labels`: of every identity there may be, for the check of groups against addresses."""

    def __init__(self, labels: Mapping[int, Labels] | None = None) -> None:
        self.revision = 0
        self.held = Held()
        self.updates = 0
        self.snapshots = 0
        self.messages = 0
        self.traceparents: list[str] = []
        self.complete = True
        self._labels = labels or {}

    def receive(self, messages: Iterable[bytes]) -> None:
        for message in messages:
            self.apply(Update.FromString(message))

    def apply(self, update: Update) -> None:
        assert update.revision >= self.revision, "the revision fell"
        assert self.messages or update.snapshot, "a stream does not begin with a snapshot"
        if not self.complete:
            assert update.revision == self.revision, "one Update, two revisions"
            assert not update.snapshot, "a snapshot begins inside an Update"
        self.messages += 1
        self.revision = update.revision
        if update.snapshot:
            self.snapshots += 1
            self.held = Held()
        self._put(update)
        self._remove(update)
        self.complete = not update.more
        if self.complete:
            self.updates += 1
            self._check()
            if update.traceparent:
                self.traceparents.append(update.traceparent)

    def _put(self, update: Update) -> None:
        held = self.held
        for group in update.groups:
            held.groups[group.id] = unpack_ids(group.identities)
            held.selectors[group.id] = group.selector
        for delta in update.group_deltas:
            assert delta.id in held.groups, f"delta of group {delta.id:x}, which is not held"
            added, removed = unpack_ids(delta.added), unpack_ids(delta.removed)
            members = held.groups[delta.id]
            assert not added & members, "added what is a member"
            assert removed <= members, "removed what is no member"
            assert not added & removed
            held.groups[delta.id] = (members | added) - removed
        for rule in update.rules:
            held.rules[rule.id] = rule
        for policy in update.local_policies:
            held.locals[policy.identity] = policy
        for a in update.addresses:
            held.addresses[a.cidr] = (a.identity, a.node, a.namespace, a.name)

    def _remove(self, update: Update) -> None:
        held = self.held
        for cidr in update.addresses_removed:
            held.addresses.pop(cidr, None)
        for identity in update.local_policies_removed:
            assert identity in held.locals, f"local policy {identity} is removed and not held"
            del held.locals[identity]
        for group in update.groups_removed:
            assert group in held.groups, f"group {group:x} is removed and not held"
            del held.groups[group], held.selectors[group]
        for rule in update.rules_removed:
            del held.rules[rule]

    def _check(self) -> None:
        held = self.held
        clauses = [c for policy in held.locals.values() for c in policy.clauses]
        needed = {group for clause in clauses for group in clause.groups}
        assert needed == held.groups.keys(), "groups held are not the groups needed"
        rules = {c.rule_id for c in clauses if c.rule_id >= FIRST_CLAUSE_RULE}
        assert rules == held.rules.keys(), "rules held are not the rules needed"
        for group, text in held.selectors.items():
            if "(" in text and " in (" not in text and " notin (" not in text:
                continue  # entity(...) or cidr(...)
            selector = Selector.parse(text)
            for identity, *_ in held.addresses.values():
                labels = self._labels.get(identity)
                if labels is not None and selector.matches(labels):
                    assert identity in held.groups[group], f"{identity} is missing from {text}"
