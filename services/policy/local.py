"""The local policy of one identity, out of the rules that select it.

rule (resolved: peers are groups) --by subject--> stance per direction + clauses
+ what the settings add: enforcement mode, traffic from the local host
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Final, Literal

from identity.numbers import (
    ENCRYPTED_OVERLAY,
    HOST,
    KUBE_APISERVER,
    REMOTE_NODE,
    UNKNOWN,
    UNMANAGED,
    WORLD,
    WORLD_IPV4,
    WORLD_IPV6,
    NumericIdentity,
    Scope,
    scope_of,
)
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    RULE_DEFAULT_ALLOW,
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    PolicyRef,
    PortRange,
    RuleId,
    RuleSource,
)
from services.policy.groups import GroupDef, definition
from services.policy.model import EntityPeer, Peer, Policy, PolicyClause, Rule, Stance
from services.policy.prefixes import Network

Enforcement = Literal["default", "always", "never"]

HOST_PEER: Final = EntityPeer("host")
_NO_ENDPOINT: Final = frozenset(
    {
        UNKNOWN,
        HOST,
        WORLD,
        UNMANAGED,
        REMOTE_NODE,
        KUBE_APISERVER,
        WORLD_IPV4,
        WORLD_IPV6,
        ENCRYPTED_OVERLAY,
    }
)


def may_be_endpoint(number: NumericIdentity) -> bool:
    """Whether policies with an endpoint selector can apply to it."""
    return number not in _NO_ENDPOINT and scope_of(number) not in (Scope.LOCAL, Scope.REMOTE_NODE)


@dataclass(frozen=True, slots=True)
class ResolvedRule:
    """A rule that selects endpoints, with groups for peers; what grants nothing is left out."""

    ref: PolicyRef
    rule: Rule
    clauses: tuple[Clause, ...]

    def stance(self, direction: Direction) -> Stance:
        return self.rule.ingress if direction is Direction.INGRESS else self.rule.egress


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """`groups` and `networks` list each use, so that uses can be counted."""

    policy: Policy
    rule_base: RuleId
    rules: tuple[ResolvedRule, ...]
    groups: tuple[GroupDef, ...]
    networks: tuple[Network, ...]
    sources: tuple[RuleSource, ...]


def resolve_policy(policy: Policy, rule_base: RuleId, cluster: str) -> ResolvedPolicy:
    rules: list[ResolvedRule] = []
    groups: list[GroupDef] = []
    sources: list[RuleSource] = []
    for number, rule in enumerate(policy.rules):
        clauses = []
        for written in rule.clauses:
            rule_id = RuleId(rule_base + len(sources))
            sources.append(_source(policy.ref, number, written, rule_id))
            resolved = None if rule.on_nodes else _clause(written, rule_id, cluster)
            if resolved is not None:
                clauses.append(resolved[0])
                groups += resolved[1]
        if not rule.on_nodes:
            rules.append(ResolvedRule(policy.ref, rule, tuple(clauses)))
    networks = tuple(network for group in groups for network in group.networks)
    return ResolvedPolicy(policy, rule_base, tuple(rules), tuple(groups), networks, tuple(sources))


def _source(ref: PolicyRef, rule_index: int, clause: PolicyClause, rule_id: RuleId) -> RuleSource:
    name = f"{clause.list_name}[{clause.index}]"
    return RuleSource(rule_id, ref, rule_index, name, clause.position.line)


def _clause(
    written: PolicyClause, rule_id: RuleId, cluster: str
) -> tuple[Clause, tuple[GroupDef, ...]] | None:
    """None when it grants nothing: a clause without groups would mean any peer."""
    if written.grants_nothing:
        return None
    groups: tuple[GroupDef, ...] = ()
    if written.peers is not None and EntityPeer("all") not in written.peers:
        groups = _groups(written.peers, cluster)
        if not groups:
            return None
    ports = _ports(written.ports or ())
    ids = tuple(group.id for group in groups)
    return Clause(written.direction, ids, ports, written.action, rule_id), groups


def _groups(peers: Iterable[Peer], cluster: str) -> tuple[GroupDef, ...]:
    found = (definition(peer, cluster) for peer in peers)
    return tuple({group.id: group for group in found if group is not None}.values())


def _ports(ports: Sequence[PortRange]) -> tuple[PortRange, ...]:
    return tuple(sorted(set(ports)))


# ------------------------------------------------------------------ assembly


@dataclass(frozen=True, slots=True)
class Assembly:
    """The settings that shape every local policy. `localhost`: the group of the local host."""

    enforcement: Enforcement
    localhost: GroupId | None

    def local_policy(
        self, identity: NumericIdentity, rules: Sequence[ResolvedRule], *, initializing: bool
    ) -> LocalPolicy:
        if self.enforcement == "never" or not may_be_endpoint(identity):
            return LocalPolicy(identity, False, False, (), (), ())
        always = initializing or self.enforcement == "always"
        ingress = _direction(rules, Direction.INGRESS, always=always)
        egress = _direction(rules, Direction.EGRESS, always=always)
        clauses = [*ingress.clauses, *egress.clauses]
        if ingress.enforced and self.localhost is not None:
            clauses.append(_allow(Direction.INGRESS, (self.localhost,), RULE_ALLOW_LOCALHOST))
        clauses.sort(key=attrgetter("rule_id"))
        return LocalPolicy(
            identity,
            ingress.enforced,
            egress.enforced,
            tuple(clauses),
            ingress.policies,
            egress.policies,
        )


@dataclass(frozen=True, slots=True)
class _Side:
    enforced: bool
    clauses: tuple[Clause, ...]
    policies: tuple[PolicyRef, ...]


def _direction(rules: Sequence[ResolvedRule], direction: Direction, *, always: bool) -> _Side:
    touching = [rule for rule in rules if rule.stance(direction) is not Stance.UNTOUCHED]
    denying = [rule for rule in touching if rule.stance(direction) is Stance.DEFAULT_DENY]
    clauses = [c for rule in touching for c in rule.clauses if c.direction is direction]
    if touching and not denying and not always:
        clauses.append(_allow(direction, (), RULE_DEFAULT_ALLOW))
    policies = sorted({rule.ref for rule in denying or touching})
    return _Side(always or bool(touching), tuple(clauses), tuple(policies))


def _allow(direction: Direction, groups: tuple[GroupId, ...], rule_id: RuleId) -> Clause:
    return Clause(direction, groups, (), Action.ALLOW, rule_id)
