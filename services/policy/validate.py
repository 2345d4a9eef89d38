"""What is legal but likely not meant: warnings about a policy that was read without an error.

Refusals are made while reading, by the module that knows the field: selectors, peers, ports,
cilium, kubernetes, parse.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.policy.clauses import Action, Direction
from services.policy.model import CidrPeer, Policy, PolicyClause, Position, Rule, Stance
from services.policy.ports import TCP, UDP

DNS_PORT = 53


@dataclass(frozen=True, slots=True)
class Warned:
    rule_index: int
    clause: PolicyClause | None
    message: str

    @property
    def position(self) -> Position | None:
        return None if self.clause is None else self.clause.position


def warnings(policy: Policy) -> Iterator[Warned]:
    """That names will not resolve is said once for a policy, of its first rule."""
    dns_said = False
    for number, rule in enumerate(policy.rules):
        for clause in rule.clauses:
            if clause.grants_nothing and not _spells_default_deny(rule, clause):
                yield Warned(number, clause, _nothing(clause))
            if clause.proxied and _stance(rule, clause) is Stance.DEFAULT_ALLOW:
                yield Warned(
                    number,
                    clause,
                    "L7 rules refuse nothing while enableDefaultDeny is off for their direction:"
                    " every request is allowed; turn it on or remove the rules",
                )
        if not dns_said and _forgets_dns(policy, rule):
            dns_said = True
            yield Warned(
                number,
                None,
                "egress is restricted and port 53 is not allowed by this policy, so names may not"
                " resolve; allow UDP and TCP port 53 to the resolver unless another policy does",
            )


def _spells_default_deny(rule: Rule, clause: PolicyClause) -> bool:
    """`ingress: [{}]`, alone in its list, is how Cilium's policies close a direction."""
    beside = [c for c in rule.clauses if c.list_name == clause.list_name]
    empty = clause.peers == () and clause.ports is None
    return empty and clause.action is Action.ALLOW and len(beside) == 1


def _stance(rule: Rule, clause: PolicyClause) -> Stance:
    return rule.ingress if clause.direction is Direction.INGRESS else rule.egress


def _nothing(clause: PolicyClause) -> str:
    does = "allows" if clause.action is Action.ALLOW else "denies"
    if clause.ports == ():
        return f"this clause {does} nothing: its ports are empty; list some or remove the field"
    return f"this clause {does} nothing: it chooses no peer; name one or remove the clause"


def _forgets_dns(policy: Policy, rule: Rule) -> bool:
    """A rule that isolates egress, allows something, and leaves out every way to a resolver."""
    allows = [c for c in rule.clauses if _allows_egress(c)]
    if rule.on_nodes or rule.egress is not Stance.DEFAULT_DENY or not allows:
        return False
    return not any(
        _reaches_dns(clause)
        for other in policy.rules
        for clause in other.clauses
        if _allows_egress(clause)
    )


def _allows_egress(clause: PolicyClause) -> bool:
    sends = clause.direction is Direction.EGRESS and clause.action is Action.ALLOW
    return sends and not clause.grants_nothing


def _reaches_dns(clause: PolicyClause) -> bool:
    """Any peer may be the resolver but one named by a narrow prefix."""
    if clause.peers and all(isinstance(peer, CidrPeer) for peer in clause.peers):
        return clause.ports is not None and _covers_dns(clause)
    return clause.ports is None or _covers_dns(clause)


def _covers_dns(clause: PolicyClause) -> bool:
    return any(
        ports.proto in (UDP, TCP) and ports.lo <= DNS_PORT <= ports.hi
        for ports in clause.ports or ()
    )
