"""What policy resolution yields and compilation consumes; the domain side of the wire messages.

Resolution runs once per cluster (policyd), compilation on each node (agent) and in `explain`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import NewType

from identity.numbers import NumericIdentity
from services.policy.l7 import Auth, ProxyRule

GroupId = NewType("GroupId", int)
RuleId = NewType("RuleId", int)

# Rule ids below 16 name no clause; the programs use them too (datapath/bpf/abi.h).
RULE_NONE = RuleId(0)
RULE_OPEN = RuleId(1)
RULE_DEFAULT_DENY = RuleId(2)
RULE_ALLOW_LOCALHOST = RuleId(3)
RULE_DEFAULT_ALLOW = RuleId(4)
RULE_CONTROL_CHANNEL = RuleId(5)
FIRST_CLAUSE_RULE = RuleId(16)


class Direction(IntEnum):
    INGRESS = 1
    EGRESS = 2


class Action(IntEnum):
    ALLOW = 1
    DENY = 2
    PASS = 3  # of an ordered tier: leaves it for the next one


class Tier(IntEnum):
    """Ordered; the first that decides is final."""

    ADMIN = 1
    NETWORK_POLICY = 2
    BASELINE = 3


@dataclass(frozen=True, slots=True, order=True)
class PortRange:
    """`proto`: IP protocol number. ICMP: lo = hi = type. 0..65535: every port of the protocol."""

    proto: int
    lo: int
    hi: int


@dataclass(frozen=True, slots=True, order=True)
class NamedPort:
    """A container port by its name; which number it is depends on the endpoint."""

    proto: int
    name: str


@dataclass(frozen=True, slots=True)
class Clause:
    """One allow or deny clause as it applies to a local identity.

    groups: union of peer groups; empty means any peer, identity unknown included.
    ports, names: union; both empty means every protocol and port.
    proxy: what L7 asks of an allowed connection; None is nothing.
    auth: None leaves it to wider clauses.
    tier, order: where it stands in an ordered tier, lower first; all of the NETWORK_POLICY tier
        stand together at order 0.
    """

    direction: Direction
    groups: tuple[GroupId, ...]
    ports: tuple[PortRange, ...]
    action: Action
    rule_id: RuleId
    names: tuple[NamedPort, ...] = ()
    proxy: ProxyRule | None = None
    auth: Auth | None = None
    tier: Tier = Tier.NETWORK_POLICY
    order: int = 0


@dataclass(frozen=True, slots=True, order=True)
class PolicyRef:
    kind: str
    namespace: str
    name: str

    def __str__(self) -> str:
        return (
            f"{self.kind} {self.namespace}/{self.name}"
            if self.namespace
            else f"{self.kind} {self.name}"
        )


@dataclass(frozen=True, slots=True)
class LocalPolicy:
    identity: NumericIdentity
    ingress_enforced: bool
    egress_enforced: bool
    clauses: tuple[Clause, ...]
    ingress_policies: tuple[PolicyRef, ...]
    egress_policies: tuple[PolicyRef, ...]


@dataclass(frozen=True, slots=True)
class RuleSource:
    """Where a rule id comes from. `clause`: ingress|egress|ingressDeny|egressDeny, with [index].

    log: what the policy wants said with each of its verdicts.
    """

    rule_id: RuleId
    policy: PolicyRef
    rule_index: int
    clause: str
    line: int
    log: str = ""

    def __str__(self) -> str:
        said = f' log "{self.log}"' if self.log else ""
        return f"{self.policy} rule {self.rule_index} {self.clause} line {self.line}{said}"
