"""A policy as values: what a manifest says, after defaults and namespace scoping.

Nil versus empty is decided while reading a manifest and lives on here as None versus ():
no peers field means any peer, an empty one means no peer, and so for ports.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from identity.selector import Selector
from services.policy.clauses import Action, Direction, NamedPort, PolicyRef, PortRange, Tier
from services.policy.l7 import Auth, ProxyRule


@dataclass(frozen=True, slots=True, order=True)
class Position:
    """One-based line and column in the manifest."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class EndpointPeer:
    """Identities by label; the namespace scope of the policy is already part of the selector."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class EntityPeer:
    name: str


@dataclass(frozen=True, slots=True)
class CidrPeer:
    """A prefix minus prefixes within it, all in canonical text (host bits zero)."""

    prefix: str
    excepts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class FqdnPeer:
    """The addresses that DNS gave for a name; `pattern` is in lower case, without a last dot."""

    pattern: str


@dataclass(frozen=True, slots=True)
class NodePeer:
    """Nodes by their labels."""

    selector: Selector


@dataclass(frozen=True, slots=True)
class CidrGroupPeer:
    """The prefixes of the CIDR group `name`, or of those with the labels of `selector`, without
    `excepts` (canonical text)."""

    name: str
    selector: Selector | None
    excepts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NamedPeer:
    """Peers under a name whose meaning is looked up elsewhere: service(...), cloud(...), ...

    Nobody, as long as nothing is known under that name.
    """

    text: str


# What a peer stands for once the CIDR groups are known.
ResolvedPeer = EndpointPeer | EntityPeer | CidrPeer | FqdnPeer | NodePeer | NamedPeer
Peer = ResolvedPeer | CidrGroupPeer


@dataclass(frozen=True, slots=True)
class ProxiedPorts:
    """An entry of toPorts that asks something of the connections it allows."""

    ports: tuple[PortRange, ...]
    names: tuple[NamedPort, ...]
    rule: ProxyRule


@dataclass(frozen=True, slots=True)
class PolicyClause:
    """One entry of ingress, egress, ingressDeny or egressDeny.

    peers: None is any peer, () is no peer. ports: None is every protocol and port, () is none of
    these; names and proxied ports come on top.
    order: position in the ordered tier of the policy; 0 in the NETWORK_POLICY tier.
    """

    direction: Direction
    action: Action
    index: int
    peers: tuple[Peer, ...] | None
    ports: tuple[PortRange, ...] | None
    position: Position
    names: tuple[NamedPort, ...] = ()
    proxied: tuple[ProxiedPorts, ...] = ()
    auth: Auth | None = None
    order: int = 0

    @property
    def list_name(self) -> str:
        side = "ingress" if self.direction is Direction.INGRESS else "egress"
        return f"{side}Deny" if self.action is Action.DENY and not self.order else side

    @property
    def grants_nothing(self) -> bool:
        no_ports = self.ports == () and not self.names and not self.proxied
        return self.peers == () or no_ports


class Stance(IntEnum):
    """What a rule means for a direction of the subjects it selects."""

    UNTOUCHED = 0
    DEFAULT_ALLOW = 1  # it has clauses there, and enableDefaultDeny is off
    DEFAULT_DENY = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """One spec. `on_nodes`: the subject selects nodes by their labels, not endpoints.

    `requirements`: what fromRequires and toRequires demand of the endpoint peers of every rule
    with the same subject, by the list they stand in.
    """

    subject: Selector
    on_nodes: bool
    ingress: Stance
    egress: Stance
    clauses: tuple[PolicyClause, ...]
    requirements: tuple[tuple[Direction, Action, Selector], ...] = ()
    position: Position = Position(1, 1)
    log: str = ""


@dataclass(frozen=True, slots=True)
class Policy:
    ref: PolicyRef
    rules: tuple[Rule, ...]
    tier: Tier = Tier.NETWORK_POLICY

    @property
    def state(self) -> str:
        """`enforced`, `enforced on ...` or `not enforced yet: <why>`."""
        if any(rule.on_nodes and rule.subject != Selector.EVERYTHING for rule in self.rules):
            return "not enforced yet: nodes have no labels to choose them by; use nodeSelector: {}"
        if any(rule.on_nodes for rule in self.rules):
            return "enforced on nodes with [agent] host_firewall = true"
        return "enforced"
