"""Which label keys a policy looks at: as its subject, or as somebody's peer."""

from __future__ import annotations

from collections.abc import Iterator

from identity.selector import Selector
from services.policy.model import EndpointPeer, Policy, Rule


def keys_of(policy: Policy) -> frozenset[str]:
    """Without their sources: a selector's key may be met by a label of any source. Nodes have
    identities of their own, so what selects nodes does not count."""
    selectors = (selector for rule in policy.rules for selector in _selectors(rule))
    return frozenset(each.key for selector in selectors for each in selector.requirements)


def _selectors(rule: Rule) -> Iterator[Selector]:
    if not rule.on_nodes:
        yield rule.subject
    for _, _, required in rule.requirements:
        yield required
    for clause in rule.clauses:
        for peer in clause.peers or ():
            if isinstance(peer, EndpointPeer):
                yield peer.selector
