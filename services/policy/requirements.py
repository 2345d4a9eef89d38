"""Requirements: demands on the endpoint peers of every rule with the same subject.

They depend on which rules meet at a subject, so they are worked into the policies of one subject
at a time, before resolution: what comes out has none left.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace

from identity.labels import Labels
from identity.selector import Requirement
from services.policy.clauses import Action, Direction
from services.policy.model import EndpointPeer, Peer, Policy, PolicyClause, Rule

_Demands = dict[tuple[Direction, Action], tuple[Requirement, ...]]


def has_requirements(policies: Iterable[Policy]) -> bool:
    return any(rule.requirements for policy in policies for rule in policy.rules)


def narrowed(policies: Iterable[Policy], subject: Labels) -> list[Policy]:
    """The policies as they apply to a subject with these labels; for no other subject."""
    held = list(policies)
    demands: defaultdict[tuple[Direction, Action], list[Requirement]] = defaultdict(list)
    for policy in held:
        for rule in policy.rules:
            if rule.requirements and rule.subject.matches(subject):
                for direction, action, selector in rule.requirements:
                    demands[direction, action] += selector.requirements
    every = {at: tuple(dict.fromkeys(found)) for at, found in demands.items()}
    return [
        replace(policy, rules=tuple(_narrow(rule, every) for rule in policy.rules))
        for policy in held
    ]


def _narrow(rule: Rule, demands: _Demands) -> Rule:
    clauses = tuple(_clause(clause, demands) for clause in rule.clauses)
    return replace(rule, clauses=clauses, requirements=())


def _clause(clause: PolicyClause, demands: _Demands) -> PolicyClause:
    found = demands.get((clause.direction, clause.action))
    if not found or clause.peers is None:
        return clause
    return replace(clause, peers=tuple(_peer(peer, found) for peer in clause.peers))


def _peer(peer: Peer, found: tuple[Requirement, ...]) -> Peer:
    return EndpointPeer(peer.selector.and_(*found)) if isinstance(peer, EndpointPeer) else peer
