"""The local policy of one identity, out of the rules that select it.

rule (resolved: peers are groups) --by subject--> stance per direction + clauses
+ what the settings add: enforcement mode, traffic from the local host
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
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
from services.policy.cidr_groups import CidrGroup, expanded
from services.policy.clauses import (
    RULE_ALLOW_LOCALHOST,
    RULE_DEFAULT_ALLOW,
    Action,
    Clause,
    Direction,
    GroupId,
    LocalPolicy,
    NamedPort,
    PolicyRef,
    PortRange,
    RuleId,
    RuleSource,
    Tier,
)
from services.policy.groups import GroupDef, definition
from services.policy.model import (
    CidrGroupPeer,
    EntityPeer,
    Peer,
    Policy,
    PolicyClause,
    ResolvedPeer,
    Rule,
    Stance,
)
from services.policy.prefixes import Network
from services.policy.residents import ByAddress

Enforcement = Literal["default", "always", "never"]

HOST_PEER: Final = EntityPeer("host")
_EVERYBODY: Final = EntityPeer("all")
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
    """A rule with groups for peers; what grants nothing is left out."""

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


@dataclass(frozen=True, slots=True)
class Naming:
    """What the groups of a policy depend on besides its peers."""

    cluster: str
    by_address: bool = False
    cidr_groups: Mapping[str, CidrGroup] = field(default_factory=dict)

    def peers(self, written: Iterable[Peer]) -> Iterator[ResolvedPeer]:
        for peer in written:
            if isinstance(peer, CidrGroupPeer):
                yield from expanded(peer, self.cidr_groups)
            else:
                yield peer

    def group(self, peer: ResolvedPeer, action: Action) -> GroupDef | None:
        if not self.by_address:
            return definition(peer, self.cluster)
        deny = action is Action.DENY
        how = ByAddress.ANY_INSIDE if deny else ByAddress.ALL_INSIDE
        return definition(peer, self.cluster, how)


def resolve_policy(policy: Policy, rule_base: RuleId, naming: Naming) -> ResolvedPolicy:
    rules: list[ResolvedRule] = []
    groups: list[GroupDef] = []
    sources: list[RuleSource] = []
    for number, rule in enumerate(policy.rules):
        clauses: list[Clause] = []
        for written in rule.clauses:
            rule_id = RuleId(rule_base + len(sources))
            sources.append(_source(policy.ref, number, rule.log, written, rule_id))
            resolved = _peers(written, naming)
            if resolved is not None:
                clauses += _clauses(written, rule_id, resolved, policy.tier)
                groups += resolved
        rules.append(ResolvedRule(policy.ref, rule, tuple(clauses)))
    networks = tuple(network for group in groups for network in group.networks)
    return ResolvedPolicy(policy, rule_base, tuple(rules), tuple(groups), networks, tuple(sources))


def _source(
    ref: PolicyRef, rule_index: int, log: str, clause: PolicyClause, rule_id: RuleId
) -> RuleSource:
    name = f"{clause.list_name}[{clause.index}]"
    return RuleSource(rule_id, ref, rule_index, name, clause.position.line, log)


def _peers(written: PolicyClause, naming: Naming) -> tuple[GroupDef, ...] | None:
    """None when it grants nothing: a clause without groups would mean any peer."""
    if written.grants_nothing:
        return None
    if written.peers is None or _EVERYBODY in written.peers:
        return ()
    found = (naming.group(peer, written.action) for peer in naming.peers(written.peers))
    return tuple({group.id: group for group in found if group is not None}.values()) or None


def _clauses(
    written: PolicyClause, rule_id: RuleId, peers: tuple[GroupDef, ...], tier: Tier
) -> Iterator[Clause]:
    """One for the plain ports, and one for each set of ports that a proxy serves."""
    plain = Clause(
        written.direction,
        tuple(group.id for group in peers),
        _ports(written.ports or ()),
        written.action,
        rule_id,
        _names(written.names),
        None,
        written.auth,
        tier,
        written.order,
    )
    if written.ports or written.names or written.ports is None:
        yield plain
    for entry in written.proxied:
        yield replace(plain, ports=_ports(entry.ports), names=_names(entry.names), proxy=entry.rule)


def _names(names: Iterable[NamedPort]) -> tuple[NamedPort, ...]:
    return tuple(sorted(set(names)))


def _ports(ports: Sequence[PortRange]) -> tuple[PortRange, ...]:
    return tuple(ports) if len(ports) < 2 else tuple(sorted(set(ports)))


# ------------------------------------------------------------------ assembly


@dataclass(frozen=True, slots=True)
class Assembly:
    """The settings that shape every local policy. `localhost`: the group of the local host."""

    enforcement: Enforcement
    localhost: GroupId | None

    def local_policy(
        self, identity: NumericIdentity, rules: Sequence[ResolvedRule], *, initializing: bool
    ) -> LocalPolicy:
        host = identity == HOST
        if self.enforcement == "never" or not (host or may_be_endpoint(identity)):
            return LocalPolicy(identity, False, False, (), (), ())
        always = initializing or (self.enforcement == "always" and not host)
        ingress = _direction(rules, Direction.INGRESS, always=always)
        egress = _direction(rules, Direction.EGRESS, always=always)
        clauses = [*ingress.clauses, *egress.clauses]
        if ingress.enforced and self.localhost is not None and not host:
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
    ordered = [c for rule in rules for c in rule.clauses if c.tier is not Tier.NETWORK_POLICY]
    touching = [rule for rule in rules if rule.stance(direction) is not Stance.UNTOUCHED]
    denying = [rule for rule in touching if rule.stance(direction) is Stance.DEFAULT_DENY]
    clauses = [c for rule in touching for c in rule.clauses if c.direction is direction]
    if touching and not denying and not always:
        clauses.append(_allow(direction, (), RULE_DEFAULT_ALLOW))
    clauses += [clause for clause in ordered if clause.direction is direction]
    policies = sorted({rule.ref for rule in denying or touching})
    return _Side(always or bool(touching), tuple(clauses), tuple(policies))


def _allow(direction: Direction, groups: tuple[GroupId, ...], rule_id: RuleId) -> Clause:
    return Clause(direction, groups, (), Action.ALLOW, rule_id)
