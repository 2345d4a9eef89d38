"""How far one policy is, node by node.

    accepted ──► resolved ──► sent ──► realised at a revision
                                 └───► failed, with the node's reason

A node is asked after when it has an endpoint that the policy selects; the others have nothing to
realise. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from identity.numbers import NumericIdentity
from services.policy.clauses import PolicyRef
from services.policyd.nodes import Nodes, Progress, failures_in_words
from services.policyd.state import State
from services.runtime.errors import NotFound

ACCEPTED: Final = "accepted"
RESOLVED: Final = "resolved"
SENT: Final = "sent"
REALISED: Final = "realised"
FAILED: Final = "failed"

# What all endpoints of a node share has no identity of its own.
_SHARED: Final = NumericIdentity(0)


@dataclass(frozen=True, slots=True)
class OnNode:
    node: str
    stage: str
    connected: bool
    realised: int
    reason: str
    identities: int


@dataclass(frozen=True, slots=True)
class Realisation:
    """`selects`: identities. `nodes`: by name, those that have endpoints of them."""

    ref: PolicyRef
    revision: int
    selects: int
    nodes: tuple[OnNode, ...]


def realisation(state: State, nodes: Nodes, ref: PolicyRef) -> Realisation:
    """Raises `NotFound`."""
    good, broken = state.policies.get(ref), state.broken.get(ref)
    found = [one for one in (good, broken) if one is not None]
    if not found:
        raise NotFound(f"policy {ref} does not exist; see `tessera policy get`")
    revision = max(one.revision for one in found)
    unread = "" if broken is None else broken.reason
    selected = state.resolver.selected_by(ref)
    concerned = state.addresses.nodes_of(map(NumericIdentity, selected))
    return Realisation(
        ref,
        revision,
        len(selected),
        tuple(
            _on_node(node, identities, nodes.progress(node), revision, unread)
            for node, identities in sorted(concerned.items())
        ),
    )


def _on_node(
    node: str,
    identities: frozenset[NumericIdentity],
    at: tuple[Progress, bool],
    revision: int,
    unread: str,
) -> OnNode:
    progress, connected = at
    if unread:
        return OnNode(node, ACCEPTED, connected, progress.realised, unread, len(identities))
    failures = {i: r for i, r in progress.failures.items() if i in identities or i == _SHARED}
    stage, reason = _stage(progress, failures, revision)
    if not connected and stage != REALISED:
        reason = f"not connected; {reason}" if reason else "not connected"
    return OnNode(node, stage, connected, progress.realised, reason, len(identities))


def _stage(
    progress: Progress, failures: Mapping[NumericIdentity, str], revision: int
) -> tuple[str, str]:
    if progress.realised >= revision:
        return (FAILED, failures_in_words(failures)) if failures else (REALISED, "")
    if progress.sent >= revision:
        return SENT, f"the node has not acknowledged it; it is at revision {progress.realised}"
    return RESOLVED, f"not sent yet; the node is at revision {progress.realised}"
