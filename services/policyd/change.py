"""What one batch of the watch changed, as keys; and many of them as one.

A change-set names what was touched and carries no values, except the differences of groups: values
are read from the state when a change-set, or a run of them, is sent, and always those of the newest
revision. That makes "the last value per key" a union of sets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pyroaring import BitMap

from services.policy.clauses import GroupId, RuleId
from services.policy.resolve import Changes, GroupChange
from services.store.model import Revision


@dataclass(frozen=True, slots=True)
class ChangeSet:
    """groups: those that came to be, to be sent whole; deltas: of groups that exist on both ends.
    locals: identities whose policy may differ, or that came or went. addresses: as Address.cidr.
    merged: how many batches it stands for."""

    revision: Revision
    traceparent: str = ""
    groups: frozenset[GroupId] = frozenset()
    deltas: Mapping[GroupId, GroupChange] = field(default_factory=dict)
    locals: BitMap = field(default_factory=BitMap)
    rules: frozenset[RuleId] = frozenset()
    addresses: frozenset[str] = frozenset()
    merged: int = 1

    @property
    def addresses_alone(self) -> bool:
        return not (self.groups or self.deltas or self.locals or self.rules)

    @property
    def weight(self) -> int:
        """Keys it holds, one for itself."""
        members = sum(len(d.added) + len(d.removed) for d in self.deltas.values())
        return 1 + len(self.groups) + len(self.locals) + len(self.addresses) + members


class Gathering:
    """Changes in the order they happened, to be one change-set."""

    def __init__(self, revision: Revision) -> None:
        self.revision = revision
        self.traceparent = ""
        self.addresses: set[str] = set()
        self.locals = BitMap()
        self._groups: set[GroupId] = set()
        self._deltas: dict[GroupId, GroupChange] = {}
        self._rules: set[RuleId] = set()
        self._merged = 0

    def resolved(self, changes: Changes) -> None:
        for group in changes.groups_removed:
            self._groups.discard(group)
            self._deltas.pop(group, None)
        self._full(changes.groups_added)
        self._differ(changes.group_deltas)
        self.locals |= changes.locals_changed
        self._rules.update(rule.rule_id for rule in changes.rules_added)

    def add(self, change: ChangeSet) -> None:
        self.revision = change.revision
        self.traceparent = change.traceparent or self.traceparent
        self._full(change.groups)
        self._differ(change.deltas)
        self.locals |= change.locals
        self._rules |= change.rules
        self.addresses |= change.addresses
        self._merged += change.merged

    def close(self) -> ChangeSet:
        return ChangeSet(
            revision=self.revision,
            traceparent=self.traceparent,
            groups=frozenset(self._groups),
            deltas=self._deltas,
            locals=self.locals,
            rules=frozenset(self._rules),
            addresses=frozenset(self.addresses),
            merged=max(self._merged, 1),
        )

    def _full(self, groups: tuple[GroupId, ...] | frozenset[GroupId]) -> None:
        # One that went and came again is another to whoever holds the old one: it is sent whole.
        self._groups.update(groups)
        for group in groups:
            self._deltas.pop(group, None)

    def _differ(self, deltas: Mapping[GroupId, GroupChange]) -> None:
        for group, later in deltas.items():
            if group in self._groups:
                continue
            earlier = self._deltas.get(group)
            self._deltas[group] = later if earlier is None else compose(earlier, later)


def compose(earlier: GroupChange, later: GroupChange) -> GroupChange:
    return GroupChange(
        added=(earlier.added - later.removed) | (later.added - earlier.removed),
        removed=(earlier.removed - later.added) | (later.removed - earlier.added),
    )
