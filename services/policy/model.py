"""A policy as values: what a manifest says, after defaults and namespace scoping.

Nil versus empty is decided while reading a manifest and lives on here as None versus ():
no peers field means any peer, an empty one means no peer, and so for ports.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from identity.selector import Selector
from services.policy.clauses import Action, Direction, PolicyRef, PortRange


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


Peer = EndpointPeer | EntityPeer | CidrPeer


@dataclass(frozen=True, slots=True)
class PolicyClause:
    """One entry of ingress, egress, ingressDeny or egressDeny.

    peers: None is any peer, () is no peer. ports: None is every protocol and port, () is none.
    """

    direction: Direction
    action: Action
    index: int
    peers: tuple[Peer, ...] | None
    ports: tuple[PortRange, ...] | None
    position: Position

    @property
    def list_name(self) -> str:
        side = "ingress" if self.direction is Direction.INGRESS else "egress"
        return side if self.action is Action.ALLOW else f"{side}Deny"

    @property
    def grants_nothing(self) -> bool:
        return self.peers == () or self.ports == ()


class Stance(IntEnum):
    """What a rule means for a direction of the subjects it selects."""

    UNTOUCHED = 0
    DEFAULT_ALLOW = 1  # it has clauses there, and enableDefaultDeny is off
    DEFAULT_DENY = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """One spec. `on_nodes`: the subject selects nodes by their labels, not endpoints."""

    subject: Selector
    on_nodes: bool
    ingress: Stance
    egress: Stance
    clauses: tuple[PolicyClause, ...]


@dataclass(frozen=True, slots=True)
class Policy:
    ref: PolicyRef
    rules: tuple[Rule, ...]

    @property
    def state(self) -> str:
        """`enforced`, or `not enforced yet: <why>`."""
        if any(rule.on_nodes for rule in self.rules):
            return "not enforced yet: host firewall (nodeSelector) is not available"
        return "enforced"
