"""Resolution: policies and identities in, selector groups and local policies out, incrementally.

    set_policy / remove_policy ----+                +--> Changes (what to tell the nodes)
                                   +--> Resolver ---+--> group(id): members of one selector
    set_identities / remove_... ---+                +--> local_policy(identity): its clauses

Each call costs in proportion to what it changes. Members of a group never appear in a local policy,
so a new identity changes groups, not the policies of those who admit it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from pyroaring import BitMap

from identity.labels import Labels
from identity.numbers import NumericIdentity
from services.policy.clauses import GroupId, LocalPolicy, PolicyRef, RuleId, RuleSource
from services.policy.model import Policy


@dataclass(frozen=True, slots=True)
class ResolverSettings:
    cluster: str = "default"
    allow_localhost: bool = True
    enforcement: Literal["default", "always", "never"] = "default"


@dataclass(frozen=True, slots=True)
class GroupChange:
    """Disjoint: nothing is both added and removed."""

    added: BitMap
    removed: BitMap


@dataclass(frozen=True, slots=True)
class GroupView:
    """A snapshot; later changes do not show in it."""

    id: GroupId
    selector: str
    members: BitMap


@dataclass(frozen=True, slots=True)
class Changes:
    """What one call changed.

    groups_added: groups that exist now and did not; read their members with group().
    group_deltas: of groups that existed before and still do; never empty deltas.
    locals_changed: identities to ask local_policy() for again: those a changed policy selects or
        selected, and those that were added or whose labels changed. Never removed ones.
    prefixes_*: node-local identities of the CIDRs policies name, keyed by canonical prefix.
    """

    groups_added: tuple[GroupId, ...] = ()
    groups_removed: tuple[GroupId, ...] = ()
    group_deltas: Mapping[GroupId, GroupChange] = field(default_factory=dict)
    locals_changed: BitMap = field(default_factory=BitMap)
    prefixes_added: Mapping[str, NumericIdentity] = field(default_factory=dict)
    prefixes_removed: Mapping[str, NumericIdentity] = field(default_factory=dict)
    rules_added: tuple[RuleSource, ...] = ()
    rules_removed: tuple[RuleId, ...] = ()


def rule_count(policy: Policy) -> int:
    """How many consecutive rule ids the policy takes: one per clause."""
    return sum(len(rule.clauses) for rule in policy.rules)


class Resolver:
    """Knows the reserved identities from the start; policies and other identities are fed in."""

    def __init__(self, settings: ResolverSettings) -> None:
        raise NotImplementedError

    def set_policy(self, policy: Policy, rule_base: RuleId) -> Changes:
        """Add or replace by ref. Clause number n, in document order, has rule id rule_base + n."""
        raise NotImplementedError

    def remove_policy(self, ref: PolicyRef) -> Changes:
        """No change when there is no such policy."""
        raise NotImplementedError

    def set_identities(self, identities: Mapping[NumericIdentity, Labels]) -> Changes:
        """Add or relabel, as one change."""
        raise NotImplementedError

    def remove_identities(self, identities: Iterable[NumericIdentity]) -> Changes:
        """Unknown, reserved and CIDR identities are left alone."""
        raise NotImplementedError

    def knows(self, identity: NumericIdentity) -> bool:
        raise NotImplementedError

    def local_policy(self, identity: NumericIdentity) -> LocalPolicy:
        """What to enforce on endpoints of this identity. Raises NotFound when it is not known."""
        raise NotImplementedError

    def group(self, group: GroupId) -> GroupView:
        """Raises NotFound when no policy uses such a group."""
        raise NotImplementedError

    def rules(self, ref: PolicyRef) -> tuple[RuleSource, ...]:
        """In rule id order; empty when there is no such policy."""
        raise NotImplementedError

    def rule(self, rule_id: RuleId) -> RuleSource | None:
        raise NotImplementedError

    def prefixes(self) -> Mapping[str, NumericIdentity]:
        """Every CIDR some policy names, with its identity; the longest match of an address wins."""
        raise NotImplementedError

    def selected_by(self, ref: PolicyRef) -> BitMap:
        """The identities the policy is enforced on; empty when there is no such policy."""
        raise NotImplementedError
