"""What is likely not meant, in view of who there is: what a manifest alone does not show.

Warnings about the manifest itself are in validate.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from services.policy.cidr_groups import CidrGroup, expanded
from services.policy.clauses import PolicyRef
from services.policy.model import CidrGroupPeer, EndpointPeer, Policy, Position
from services.policy.resolve import Resolver


@dataclass(frozen=True, slots=True)
class Advice:
    ref: PolicyRef
    position: Position
    message: str

    def __str__(self) -> str:
        return f"{self.ref} line {self.position.line}: {self.message}"


def idle(
    policy: Policy, resolver: Resolver, groups: Mapping[str, CidrGroup] | None = None
) -> Iterator[Advice]:
    """Selectors that choose nobody now, of subjects and of peers; CIDR groups that do not exist."""
    for rule in policy.rules:
        if not rule.on_nodes and not resolver.endpoints(rule.subject):
            yield Advice(policy.ref, rule.position, "it selects no endpoint now")
        for clause in rule.clauses:
            for peer in clause.peers or ():
                if isinstance(peer, EndpointPeer) and not resolver.chooses(peer.selector):
                    words = f"nobody has {peer.selector} now; are the labels spelt as on the peers?"
                    yield Advice(policy.ref, clause.position, words)
                if isinstance(peer, CidrGroupPeer) and not list(expanded(peer, groups or {})):
                    what = peer.name or f"with {peer.selector}"
                    words = f"there is no CIDR group {what} that has prefixes: it chooses nobody"
                    yield Advice(policy.ref, clause.position, words)
